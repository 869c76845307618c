"""An encoder as the driver serves it: loaded from its folder, batches of any kind, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmos.drivers.jax import platform
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.encoders import encoder
from llmos.drivers.jax.encoders.engine import EncoderSpec, length_buckets
from llmos.drivers.sdk.driver import Pending
from llmos.drivers.sdk.messages import EncodeStep, LoadedModel, LoadRequest
from llmos.ipc.errors import InvalidArgument, NotFound

FAMILIES = Path(__file__).parents[3] / "data" / "families"


@pytest.fixture(scope="module", autouse=True)
def kept_programs(programs_folder: Path) -> None:
    platform.keep_programs(str(programs_folder))


@pytest.fixture(scope="module")
def small() -> Any:
    """One loaded encoder, with few programs."""
    made = JaxDriver("cpu")
    load(made, FAMILIES / "bert", max_context=32, chunk_tokens=64)
    yield made
    made.unload("e")


@pytest.fixture
def driver() -> Any:
    made = JaxDriver("cpu")
    yield made
    for model in [*made._encoders, *made._engines]:
        made.unload(model)


def load(driver: JaxDriver, source: str | Path, **more: Any) -> LoadedModel:
    sizes = {"max_context": 16, "chunk_tokens": 48, **more}
    return driver.load(LoadRequest(model="e", source=str(source), **sizes), lambda _: None)


def encode(driver: JaxDriver, texts: list[list[int]], types: list[list[int]] | None = None) -> np.ndarray:
    result = driver.encode(EncodeStep(model="e", texts=texts, types=types or []))()
    assert result.micros > 0
    return np.frombuffer(result.rows, "<f4").reshape(len(texts), result.width)


def inputs(folder: Path) -> tuple[dict[str, np.ndarray], list[list[int]], list[list[int]]]:
    """What transformers made of a fixture, and the texts it was given, without their padding."""
    expected = load_file(folder / "expected.tensors")
    lengths = expected["lengths"].tolist()
    rows = lambda name: [row[:n] for row, n in zip(expected[name].tolist(), lengths)]  # noqa: E731
    return expected, rows("tokens"), rows("types")


@pytest.mark.parametrize(
    ("name", "output", "tolerance"),
    [("bert", "mean", 2e-6), ("roberta", "mean", 2e-6), ("bert_pairs", "logits", 2e-5),
     ("roberta_labels", "logits", 2e-5)],
)  # fmt: skip
def test_each_kind_of_encoder_is_served_as_transformers_computes_it(
    driver: JaxDriver, name: str, output: str, tolerance: float
) -> None:
    loaded = load(driver, FAMILIES / name)
    expected, texts, types = inputs(FAMILIES / name)
    assert (loaded.kind, loaded.family, loaded.width) == ("encoder", "bert", expected[output].shape[1])
    assert (loaded.pages, loaded.slots) == (0, 0)
    assert len(loaded.labels) == (0 if output == "mean" else loaded.width)
    np.testing.assert_allclose(encode(driver, texts, types), expected[output], atol=tolerance)


def test_a_text_is_encoded_alike_in_any_company(small: JaxDriver) -> None:
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 64, size).tolist() for size in (1, 16, 3)]
    together = encode(small, texts)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(together[row : row + 1], encode(small, [text]), atol=1e-5)


def test_random_weights_of_a_configuration_are_served(driver: JaxDriver) -> None:
    loaded = load(driver, f"random:{FAMILIES / 'bert' / 'config.json'}", dtype="bfloat16")
    made = encode(driver, [[1, 2, 3]])
    assert made.shape == (1, loaded.width)
    assert np.linalg.norm(made) == pytest.approx(1, abs=1e-2)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(FAMILIES / name, tmp_path / name))


def test_the_second_load_restores_what_the_first_kept(
    driver: JaxDriver, tmp_path: Path, copied: Callable[[str], Path]
) -> None:
    folder = copied("bert_pairs")
    expected, texts, types = inputs(folder)
    first = load(driver, folder, cache=str(tmp_path / "cache"))
    driver.unload("e")
    second = load(driver, folder, cache=str(tmp_path / "cache"))
    assert ("convert" in first.phases, "restore" in second.phases) == (True, True)
    np.testing.assert_allclose(encode(driver, texts, types), expected["logits"], atol=2e-5)
    driver.unload("e")
    (kept,) = (tmp_path / "cache" / "weights").iterdir()
    assert load(driver, kept).labels == first.labels
    np.testing.assert_allclose(encode(driver, texts, types), expected["logits"], atol=2e-5)


def test_pooling_and_the_longest_text_are_the_folders(
    driver: JaxDriver, copied: Callable[[str], Path]
) -> None:
    folder = copied("bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "modules.json").write_text("[]")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    assert load(driver, folder).max_context == 12
    expected, texts, types = inputs(folder)
    np.testing.assert_allclose(encode(driver, texts, types), expected["cls"], atol=2e-5)


def test_it_is_said_for_how_many_tokens_a_step_was_computed(small: JaxDriver) -> None:
    pending = small.encode(EncodeStep(model="e", texts=[[5] * 20, [5] * 3]))
    assert isinstance(pending, Pending)
    step = pending()
    assert pending.ready()
    assert step.computed == 2 * 32


@pytest.mark.parametrize(
    ("texts", "types", "message"),
    [
        ([], [], "0 texts"),
        ([[]], [], "0 tokens"),
        ([[1] * 33], [], "33 tokens, not 1 to 32"),
        ([[10**6]], [], "not below"),
        ([[-1]], [], "not below"),
        ([[1, 2]], [[0]], "types"),
        ([[1]], [[7]], "types"),
        ([[1], [2]], [[0]], "rows of types"),
        ([[1] * 32] * 9, [], "exceed 64"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    small: JaxDriver, texts: list[list[int]], types: list[list[int]], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        small.encode(EncodeStep(model="e", texts=texts, types=types))


def test_what_is_no_encoder_or_not_loaded_is_said(driver: JaxDriver) -> None:
    with pytest.raises(NotFound, match="encoder e is not loaded"):
        driver.encode(EncodeStep(model="e", texts=[[1]]))
    with pytest.raises(InvalidArgument, match="dtype"):
        load(driver, FAMILIES / "bert", dtype="int8")


def test_buckets_hold_every_text_in_no_more_than_a_step() -> None:
    assert length_buckets(20) == [16, 20]
    assert length_buckets(16) == [16]
    spec = EncoderSpec(None, None, [], length_buckets(256), 256, 2, 0)
    assert [spec.rows_for(length) for length in (16, 128, 256)] == [[1, 4, 16], [1, 2], [1]]


@pytest.mark.parametrize(
    ("texts", "sizes", "calls"),
    [
        (64, [1, 128], [(64, 128)]),  # while the programs between are compiled
        (40, [1, 4, 16, 64, 128], [(16, 16), (16, 16), (8, 16)]),
        (100, [1, 4, 16, 64, 128], [(100, 128)]),
        (3, [1, 4, 16, 64, 128], [(3, 4)]),
        (130, [1, 4, 16, 64, 128], [(128, 128), (2, 4)]),
        (2, [1], [(1, 1), (1, 1)]),
    ],
)
def test_texts_are_not_cut_into_calls_that_take_as_long_as_one_of_more(
    texts: int, sizes: list[int], calls: list[tuple[int, int]]
) -> None:
    spec = EncoderSpec(None, None, [], length_buckets(128), 128 * 128, 2, least=2048)
    assert spec.calls(texts, 128, sizes) == calls


def test_what_a_gpu_is_asked_for_is_the_same_attention() -> None:
    """With XLA's implementation in the place of cuDNN's, which needs the device."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 12, 2, 16)), jnp.float32) for _ in range(3))
    lengths = jnp.asarray([12, 5, 0], jnp.int32)
    made = encoder._mix_on_gpu(q, k, v, lengths, by="xla")
    expected = encoder._mix_anywhere(q, k, v, lengths)
    np.testing.assert_allclose(made[:2], expected[:2], atol=2e-6)
    assert np.isfinite(made[2]).all(), "what pads a batch is no reason to fail"


@pytest.mark.parametrize(
    ("platform_name", "dtype", "head_dim", "suits"),
    [
        ("cuda", jnp.bfloat16, 64, True),
        ("cuda", jnp.float32, 64, False),
        ("cuda", jnp.bfloat16, 20, False),
        ("cpu", jnp.bfloat16, 64, False),
    ],
)
def test_cudnn_attends_where_it_can(platform_name: str, dtype: Any, head_dim: int, suits: bool) -> None:
    q = jnp.zeros((1, 4, 2, head_dim), dtype)
    assert encoder.on_cudnn(q, platform_name) is suits

"""Models in 8 bits, loaded whole: what is kept, what it weighs, and that a batch changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.execution.spec import Spec
from llmos.drivers.jax.loading import parameters, requests
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.random import fill
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument

PROMPTS = [list(range(3, 50)), [5, 9, 77, 31], [88] * 17]
KINDS = ["int8", "float8"]


def asking(source: Path, cache: Path, **fields: Any) -> LoadRequest:
    small = {"page_tokens": 8, "pages": 64, "slots": 4, "max_context": 128, "chunk_tokens": 32}
    return LoadRequest(model="m", source=str(source), cache=str(cache), **(small | fields))


@pytest.fixture(scope="module", autouse=True)
def only_what_is_used() -> Iterator[None]:
    """No program is compiled before it is needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spec, "ahead", lambda self: [])
        yield


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, helpers: Any, tiny_folder: Path, tmp_path_factory: Any) -> Any:
    kind = request.param
    cache = helpers.make_cache(tmp_path_factory.mktemp(kind), request.getfixturevalue("programs_folder"))
    driver = JaxDriver("cpu")
    asked = asking(tiny_folder, cache, weights=kind, kv_dtype=kind)
    runner = helpers.Runner(driver, driver.load(asked, helpers.ignore))
    return SimpleNamespace(kind=kind, cache=cache, driver=driver, runner=runner, asked=asked)


def test_tokens_are_the_same_alone_in_a_batch_and_in_chunks(loaded: Any, helpers: Any) -> None:
    alone = [loaded.runner.run(helpers.Task(prompt, 12))[0] for prompt in PROMPTS]
    assert loaded.runner.run(*(helpers.Task(prompt, 12, chunk=9) for prompt in PROMPTS)) == alone


def test_greedy_tokens_stay_near_the_float_model(loaded: Any, helpers: Any, tiny_tensors: Any) -> None:
    exact = helpers.dense_greedy(helpers.TINY, tiny_tensors, PROMPTS[1], 4)
    assert loaded.runner.run(helpers.Task(PROMPTS[1], 4))[0][:2] == exact[:2]


def test_what_is_8_bits_weighs_a_quarter(loaded: Any, tiny_tensors: Any) -> None:
    model, kv_heads, layers = loaded.runner.loaded, 2, 2
    parameters = sum(tensor.size for tensor in tiny_tensors.values())
    products = [t for name, t in tiny_tensors.items() if "_proj" in name]
    small, channels = sum(t.size for t in products), sum(t.shape[0] for t in products)
    assert model.parameters == parameters
    assert model.weight_bytes == 4 * (parameters - small) + small + 4 * channels
    assert model.page_bytes == 8 * layers * 2 * kv_heads * (8 + 4)
    for layer in loaded.driver._engines["m"][0].replica.caches:
        assert {part.shape[0] for part in jax.tree.leaves(layer)} == {model.pages + 1}


def test_a_warm_start_restores_values_and_scales(loaded: Any, helpers: Any, tiny_folder: Path) -> None:
    first = loaded.driver._engines["m"][0].replica.weights_for(adapters=True)
    driver = JaxDriver("cpu")
    again = driver.load(loaded.asked, helpers.ignore)
    assert "restore" in again.phases
    assert "convert" not in again.phases
    for old, new in zip(first, driver._engines["m"][0].replica.weights_for(adapters=True), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(np.asarray(old, np.float32), np.asarray(new, np.float32))


def test_a_kept_checkpoint_of_another_precision_is_refused(loaded: Any, helpers: Any) -> None:
    (kept,) = (loaded.cache / "weights").iterdir()
    assert kept.name.startswith(f"float32-{loaded.kind}-")
    assert checkpoint.is_checkpoint(str(kept))
    with pytest.raises(InvalidArgument, match=r"is not in float32$"):
        JaxDriver("cpu").load(asking(kept, loaded.cache), helpers.ignore)


def test_a_failed_sequence_leaves_clean_pages(loaded: Any, helpers: Any) -> None:
    runner, task = loaded.runner, helpers.Task(PROMPTS[1], 10)
    (whole,) = runner.run(task)
    runner.steps(1, start=[runner.start(0, task)], chunks=[helpers.Chunk(0, 0, 0, 4)])
    replica, broken = loaded.driver._engines["m"][0].replica, runner.pages(0, 8)[0]
    replica.caches = [c._replace(v_scale=c.v_scale.at[broken].set(np.nan)) for c in replica.caches]
    assert runner.steps(12, decode=[0])[0].finished == [(0, "error")]
    runner.steps(1, release=[0])
    assert runner.run(task) == [whole]


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_have_the_scales_of_quantised_ones(kind: Any, helpers: Any, tiny_folder: Path) -> None:
    from llmos.drivers.jax import families
    from llmos.drivers.jax.weights.source import open_source

    source = open_source(str(tiny_folder))
    config = families.find(source).configure["safetensors"](source)
    shapes = parameters.parameters(config, jnp.bfloat16, OneDevice(jax.devices()[0]), kind)[2]
    made = fill(shapes)
    assert {path: (x.shape, x.dtype) for path, x in made.items()} == {
        path: (x.shape, x.dtype) for path, x in shapes.items()
    }
    weight, scale = made["layers.0.mlp.down.weight"], made["layers.0.mlp.down.scale"]
    peaks = np.abs(np.asarray(weight, np.float32)).max(axis=1)
    assert (peaks == quant._LARGEST[weight.dtype]).all()
    assert 0.5 < float((weight.astype(jnp.float32) * scale[:, None]).std()) * 48**0.5 < 1.5


def test_a_bad_tensor_is_refused_by_its_name(helpers: Any, tmp_path: Path, fresh_cache: Path) -> None:
    tensors = helpers.random_tensors(helpers.TINY)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 3] = float("nan")
    folder = helpers.write_folder(tmp_path / "bad", helpers.TINY, tensors)
    with pytest.raises(InvalidArgument, match=f"'{name}' holds values that are not finite"):
        JaxDriver("cpu").load(asking(folder, fresh_cache, weights="int8"), helpers.ignore)


def test_an_8_bit_dtype_to_compute_in_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match='ask for 8-bit weights by weights = "int8"'):
        requests.check_request(asking(tmp_path, tmp_path, dtype="int8"))


@pytest.mark.parametrize("field", ["weights", "kv_dtype"])
def test_float8_is_refused_on_a_gpu_without_it(tmp_path: Path, field: str) -> None:
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    asked = asking(tmp_path, tmp_path, **{field: "float8"})
    with pytest.raises(InvalidArgument, match=r"A100 has 8\.0: use int8"):
        requests.check_device(asked, device)
    device.compute_capability = "9.0"
    requests.check_device(asked, device)

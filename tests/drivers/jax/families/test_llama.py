"""The Llama family's configuration mapping, and the registry's refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.jax import families
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.weights.source import open_source
from llmos.ipc.errors import InvalidArgument


def configured(folder: Path, helpers: Any, **changes: Any) -> DecoderConfig:
    config = {k: v for k, v in (helpers.TINY | changes).items() if v is not None}
    source = open_source(str(helpers.write_folder(folder, config, helpers.random_tensors(helpers.TINY))))
    family = families.find(source)
    return family.configure[source.format](source)


def test_gguf_and_hugging_face_describe_the_same_model(
    tmp_path: Path, helpers: Any, tiny_tensors: Any
) -> None:
    source = open_source(str(helpers.write_gguf(tmp_path / "m.gguf", helpers.TINY, tiny_tensors)))
    family = families.find(source)
    from_gguf = family.configure["gguf"](source)
    from_hf = configured(tmp_path / "hf", helpers)
    assert from_gguf.norm_eps == pytest.approx(from_hf.norm_eps)
    assert {k: v for k, v in vars(from_gguf).items() if k != "norm_eps"} == {
        k: v for k, v in vars(from_hf).items() if k != "norm_eps"
    }


def test_defaults_follow_hugging_face(tmp_path: Path, helpers: Any) -> None:
    config = configured(
        tmp_path,
        helpers,
        num_key_value_heads=None,
        rope_theta=None,
        tie_word_embeddings=None,
        eos_token_id=[7, 8],
    )
    assert (config.kv_heads, config.rope_theta, config.tied) == (4, 10000.0, False)
    assert config.stop_tokens == (7, 8)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_scaling(tmp_path: Path, helpers: Any, key: str) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert len(configured(tmp_path / "a", helpers, **{key: scaling}).rope_factors) == 4
    linear = configured(tmp_path / "b", helpers, **{key: {"type": "linear", "factor": 2.0}})
    assert linear.rope_factors == (2.0,) * 4
    with pytest.raises(InvalidArgument, match=r"yarn.*known"):
        configured(tmp_path / "c", helpers, **{key: {"rope_type": "yarn"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Zebra"]}, "unknown architecture Zebra; known in safetensors files: Llama"),
        ({"architectures": None}, "unknown architecture"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_what_is_not_this_family_is_refused(
    tmp_path: Path, helpers: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        configured(tmp_path, helpers, **changes)

"""What each family's configuration means, and which variants are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.jax import families
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.weights.source import Format
from llmos.ipc.errors import InvalidArgument

DATA = Path(__file__).parents[3] / "data" / "families"

LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    "partial_rotary_factor": 0.75,
}


class Config:
    """A checkpoint of which only the configuration is looked at."""

    format: Format = "safetensors"

    def __init__(self, name: str, **changes: Any) -> None:
        config: dict[str, Any] = json.loads((DATA / name / "config.json").read_text()) | changes
        self.config = {key: value for key, value in config.items() if value != "absent"}

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    def read(self, name: str) -> np.ndarray:
        raise AssertionError(name)


def configured(name: str, **changes: Any) -> DecoderConfig:
    source = Config(name, **changes)
    return families.find(source).configure["safetensors"](source)


def test_names_are_unique_and_unknown_ones_list_them() -> None:
    names = [family.name for family in families.families()]
    assert len(set(names)) == len(names)
    with pytest.raises(InvalidArgument, match=r"unknown architecture Zebra; known .*Llama.*Gemma2.*GPT2"):
        families.find(Config("llama", architectures=["Zebra"]))
    with pytest.raises(InvalidArgument, match="unknown family zebra; known: llama"):
        families.by_name("zebra")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi4", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        (
            "phi4",
            LONGROPE | {"original_max_position_embeddings": "absent"},
            "original_max_position_embeddings",
        ),
        ("phi4", LONGROPE, r"rope factors \(1.0,\) do not fit 12 components"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, "yarn"),
        ("gemma2", {"hidden_activation": "relu2"}, "relu2"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "tanh"}, "tanh"),
        ("gpt2", {"n_embd": None}, "n_embd"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "one per layer"),
        ("mixtral", {"num_local_experts": 10**6}, "experts"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("phi4", {"partial_rotary_factor": 0.6}, "rotary"),
    ],
)
def test_variants_that_are_not_known_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        configured(name, **changes)


def test_gemma_2_as_published_alternates_windows() -> None:
    config = configured(
        "gemma2",
        layer_types="absent",
        num_hidden_layers=4,
        attn_logit_softcapping="absent",
        final_logit_softcapping="absent",
        tie_word_embeddings="absent",
    )
    assert config.windows == (6, 0, 6, 0)
    assert (config.attention_cap, config.logit_cap, config.tied) == (50.0, 30.0, True)


def test_gemma_3_as_published_has_two_rotary_bases() -> None:
    published = {"layer_types": "absent", "_sliding_window_pattern": "absent", "rope_parameters": "absent"}
    config = configured("gemma3", **published, rope_theta=5e5, rope_local_base_freq=2e4)
    assert config.windows == (6, 6, 6, 6, 6, 0, 6)
    assert (config.rope_theta, config.local_theta, config.rope_factors) == (5e5, 2e4, ())
    assert configured("gemma3", **published).rope_theta == 1e6


def test_qwen_uses_windows_only_if_told_to() -> None:
    published = {"layer_types": "absent", "sliding_window": 8, "max_window_layers": 1}
    assert configured("qwen2", **published, use_sliding_window=False).windows == ()
    assert configured("qwen2", **published, use_sliding_window=True).windows == (0, 8)


def test_qwen_moe_as_published() -> None:
    config = configured(
        "qwen3_moe", num_local_experts="absent", num_experts=6, decoder_sparse_step=2, mlp_only_layers=[]
    )
    assert (config.experts, config.dense_layers) == (6, (0,))
    assert not configured("qwen3_moe", norm_topk_prob="absent").normalise_experts

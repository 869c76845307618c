"""Qwen3 and Qwen3-MoE: Llama with norms on queries and keys, and experts on most layers of the latter."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmos.drivers.jax.decoder.config import DecoderConfig, require
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import gguf_experts, gguf_fields, gguf_meta, hf_fields, refuse
from llmos.drivers.jax.families.layout import GGUF, HF, decoder_rules
from llmos.drivers.jax.families.qwen2 import windows
from llmos.drivers.jax.weights.source import Source
from llmos.ipc.errors import InvalidArgument

_EXPERT = "model.layers.{}.mlp.experts.{}"
_LAYOUT = HF.renamed(
    router="model.layers.{}.mlp.gate",
    experts_gate=f"{_EXPERT}.gate_proj",
    experts_up=f"{_EXPERT}.up_proj",
    experts_down=f"{_EXPERT}.down_proj",
)


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    refuse(source.config, "qwen3", "attention_bias")
    fields = hf_fields(source.config)
    experts = _experts(source.config, fields["layers"]) if _sparse(source.config) else {}
    return DecoderConfig(**fields, **experts, qk_norm=True, windows=windows(source.config))


def configure_gguf(architecture: str, source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file."""
    fields = gguf_fields(source, architecture)
    experts = gguf_experts(gguf_meta(source, architecture), fields["intermediate"])
    return DecoderConfig(**fields, **experts, qk_norm=True)


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from."""
    return decoder_rules(GGUF if source.format == "gguf" else _LAYOUT, config)


def _sparse(config: dict[str, Any]) -> bool:
    return "Qwen3MoeForCausalLM" in (config.get("architectures") or [])


def _experts(config: dict[str, Any], layers: int) -> dict[str, Any]:
    step = int(config.get("decoder_sparse_step") or 1)
    if not 0 < layers <= 1 << 10 or step < 1:
        raise InvalidArgument(f"{layers} layers and decoder_sparse_step {step} are out of range")
    plain = set(config.get("mlp_only_layers") or [])
    return {
        "experts": int(config.get("num_experts") or require(config, "num_local_experts")),
        "active_experts": int(require(config, "num_experts_per_tok")),
        "expert_intermediate": int(require(config, "moe_intermediate_size")),
        "normalise_experts": bool(config.get("norm_topk_prob", False)),
        "dense_layers": tuple(i for i in range(layers) if i in plain or (i + 1) % step),
    }


FAMILIES = [
    Family(
        name=name,
        architectures={"safetensors": (f"{label}ForCausalLM",), "gguf": (gguf,)},
        configure={"safetensors": configure_hf, "gguf": partial(configure_gguf, gguf)},
        rules=rules,
    )
    for name, label, gguf in (("qwen3", "Qwen3", "qwen3"), ("qwen3-moe", "Qwen3Moe", "qwen3moe"))
]

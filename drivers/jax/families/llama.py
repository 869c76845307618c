"""Llama 2 and 3.x, SmolLM and whatever else has exactly their architecture.

Files in GGUF call Mistral and Mixtral "llama" too; a window they do not know, experts they do.
"""

from __future__ import annotations

from dataclasses import replace

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import gguf_experts, gguf_fields, gguf_meta, hf_fields, refuse
from llmos.drivers.jax.families.layout import GGUF, HF, decoder_rules
from llmos.drivers.jax.weights.source import Source


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    refuse(source.config, "llama", "attention_bias", "mlp_bias")
    return DecoderConfig(**hf_fields(source.config))


def configure_gguf(source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file."""
    fields = gguf_fields(source, "llama")
    return DecoderConfig(**fields, **gguf_experts(gguf_meta(source, "llama"), fields["intermediate"]))


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from; llama.cpp reorders this family's query and key rows."""
    if source.format == "safetensors":
        return decoder_rules(HF, config)
    layout = replace(GGUF, turned=True)
    if config.experts and source.shape("blk.0.ffn_gate.0.weight"):
        single = {f"experts_{name}": f"blk.{{}}.ffn_{name}.{{}}" for name in ("gate", "up", "down")}
        layout = layout.renamed(**single)
    return decoder_rules(layout, config)


FAMILIES = [
    Family(
        name="llama",
        architectures={"safetensors": ("LlamaForCausalLM",), "gguf": ("llama",)},
        configure={"safetensors": configure_hf, "gguf": configure_gguf},
        rules=rules,
    )
]

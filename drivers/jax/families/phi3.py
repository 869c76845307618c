"""Phi-3, 3.5 and 4: Llama whose checkpoints hold fused products, with partly turned heads in Phi-4-mini."""

from __future__ import annotations

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import gguf_fields, gguf_meta, hf_fields, hf_windows, refuse
from llmos.drivers.jax.families.layout import GGUF, HF, decoder_rules
from llmos.drivers.jax.weights.source import Source

_HF = HF.renamed(qkv="model.layers.{}.self_attn.qkv_proj", gate_up="model.layers.{}.mlp.gate_up_proj")
_GGUF = GGUF.renamed(qkv="blk.{}.attn_qkv", gate_up="blk.{}.ffn_up")


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    refuse(source.config, "phi3", "attention_bias")
    return DecoderConfig(**hf_fields(source.config), windows=hf_windows(source.config))


def configure_gguf(source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file."""
    fields = gguf_fields(source, "phi3")
    window = int(gguf_meta(source, "phi3").get("attention.sliding_window") or 0)
    layers = min(fields["layers"], 1 << 10)
    return DecoderConfig(**fields, windows=(window,) * layers if window else ())


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from."""
    return decoder_rules(_GGUF if source.format == "gguf" else _HF, config)


FAMILIES = [
    Family(
        name="phi3",
        architectures={"safetensors": ("Phi3ForCausalLM",), "gguf": ("phi3",)},
        configure={"safetensors": configure_hf, "gguf": configure_gguf},
        rules=rules,
    )
]

"""Mistral: Llama with a sliding window on every layer, where the model has one (GGUF: see ``llama``)."""

from __future__ import annotations

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import hf_fields, hf_windows
from llmos.drivers.jax.families.layout import HF, decoder_rules
from llmos.drivers.jax.weights.source import Source


def configure(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    return DecoderConfig(**hf_fields(source.config), windows=hf_windows(source.config))


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from."""
    return decoder_rules(HF, config)


FAMILIES = [
    Family(
        name="mistral",
        architectures={"safetensors": ("MistralForCausalLM",)},
        configure={"safetensors": configure},
        rules=rules,
    )
]

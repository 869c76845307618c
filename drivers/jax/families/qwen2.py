"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and windows on the upper layers if asked."""

from __future__ import annotations

from typing import Any

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import gguf_fields, hf_fields, hf_windows
from llmos.drivers.jax.families.layout import GGUF, HF, decoder_rules
from llmos.drivers.jax.weights.source import Source


def windows(config: dict[str, Any]) -> tuple[int, ...]:
    """Windows of a Qwen: none unless ``use_sliding_window``, and then from ``max_window_layers`` on."""
    if not config.get("use_sliding_window"):
        return ()
    full = int(config.get("max_window_layers", 28))
    found = hf_windows(config)
    if config.get("layer_types"):
        return found
    return tuple(0 if layer < full else window for layer, window in enumerate(found))


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    return DecoderConfig(**hf_fields(source.config), qkv_bias=True, windows=windows(source.config))


def configure_gguf(source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file."""
    return DecoderConfig(**gguf_fields(source, "qwen2"), qkv_bias=True)


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from."""
    return decoder_rules(GGUF if source.format == "gguf" else HF, config)


FAMILIES = [
    Family(
        name="qwen2",
        architectures={"safetensors": ("Qwen2ForCausalLM",), "gguf": ("qwen2",)},
        configure={"safetensors": configure_hf, "gguf": configure_gguf},
        rules=rules,
    )
]

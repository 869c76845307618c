"""GPT-2: layer norms, learned positions, biases everywhere, and matrices stored [in, out] (Conv1D)."""

from __future__ import annotations

from typing import Any

from llmos.drivers.jax.decoder.config import DecoderConfig, require
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import activation, gguf_fields, hf_stops, refuse
from llmos.drivers.jax.families.layout import GGUF, Layout, decoder_rules
from llmos.drivers.jax.weights.source import Source

_HF = {
    "embedding": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "attention_norm": "h.{}.ln_1",
    "qkv": "h.{}.attn.c_attn",
    "out": "h.{}.attn.c_proj",
    "mlp_norm": "h.{}.ln_2",
    "up": "h.{}.mlp.c_fc",
    "down": "h.{}.mlp.c_proj",
}
_GGUF = GGUF.renamed(qkv="blk.{}.attn_qkv")
_CONSTANTS: dict[str, Any] = {
    "rope_theta": 0.0,
    "learned_positions": True,
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    config = source.config
    refuse(config, "gpt2", "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    hidden, heads = int(require(config, "n_embd")), int(require(config, "n_head"))
    return DecoderConfig(
        vocab_size=int(require(config, "vocab_size")),
        hidden=hidden,
        layers=int(require(config, "n_layer")),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // max(heads, 1),
        intermediate=int(config.get("n_inner") or 4 * hidden),
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        max_positions=int(config.get("n_positions", 1024)),
        activation=activation(config.get("activation_function", "gelu_new")),
        tied=bool(config.get("tie_word_embeddings", True)),
        stop_tokens=hf_stops(config),
        **_CONSTANTS,
    )


def configure_gguf(source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file."""
    return DecoderConfig(**(gguf_fields(source, "gpt2") | _CONSTANTS | {"activation": "gelu_tanh"}))


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from; the published files lack the prefix that saving a model gives."""
    if source.format == "gguf":
        return decoder_rules(_GGUF, config)
    prefix = "" if source.shape("wte.weight") else "transformer."
    names = {role: prefix + name for role, name in _HF.items()}
    return decoder_rules(Layout({**names, "head": "lm_head"}, transposed=True), config)


FAMILIES = [
    Family(
        name="gpt2",
        architectures={"safetensors": ("GPT2LMHeadModel",), "gguf": ("gpt2",)},
        configure={"safetensors": configure_hf, "gguf": configure_gguf},
        rules=rules,
    )
]

"""Llama 2 and 3.x, SmolLM and whatever else has exactly their architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmos.drivers.jax.config import DecoderConfig, require
from llmos.drivers.jax.families import Family, Part, Rules
from llmos.drivers.jax.rope import llama3_factors
from llmos.drivers.jax.weights.source import Format, Source
from llmos.ipc.errors import InvalidArgument

_NAMES: dict[Format, dict[str, str]] = {
    "safetensors": {
        "embedding": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "attention_norm": "model.layers.{}.input_layernorm.weight",
        "q": "model.layers.{}.self_attn.q_proj.weight",
        "k": "model.layers.{}.self_attn.k_proj.weight",
        "v": "model.layers.{}.self_attn.v_proj.weight",
        "out": "model.layers.{}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "down": "model.layers.{}.mlp.down_proj.weight",
    },
    "gguf": {
        "embedding": "token_embd.weight",
        "norm": "output_norm.weight",
        "head": "output.weight",
        "attention_norm": "blk.{}.attn_norm.weight",
        "q": "blk.{}.attn_q.weight",
        "k": "blk.{}.attn_k.weight",
        "v": "blk.{}.attn_v.weight",
        "out": "blk.{}.attn_output.weight",
        "mlp_norm": "blk.{}.ffn_norm.weight",
        "gate": "blk.{}.ffn_gate.weight",
        "up": "blk.{}.ffn_up.weight",
        "down": "blk.{}.ffn_down.weight",
    },
}


def configure_hf(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    config = source.config
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InvalidArgument(f"the llama family has no biases, but {key} is set")
    if config.get("hidden_act", "silu") != "silu":
        raise InvalidArgument(f"the llama family uses silu, not {config['hidden_act']}")
    hidden, heads = int(require(config, "hidden_size")), int(require(config, "num_attention_heads"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    head_dim = int(config.get("head_dim") or hidden // max(heads, 1))
    stop = config.get("eos_token_id")
    return DecoderConfig(
        vocab_size=int(require(config, "vocab_size")),
        hidden=hidden,
        layers=int(require(config, "num_hidden_layers")),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        intermediate=int(require(config, "intermediate_size")),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        max_positions=int(config.get("max_position_embeddings", 2048)),
        rope_factors=_rope_factors(rope, head_dim, theta),
        tied=bool(config.get("tie_word_embeddings", False)),
        stop_tokens=tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),),
    )


def configure_gguf(source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file; the vocabulary's size is that of the embedding."""
    meta = {key.removeprefix("llama."): value for key, value in source.config.items()}
    embedding = source.shape(_NAMES["gguf"]["embedding"])
    if embedding is None:
        raise InvalidArgument("tensor 'token_embd.weight' is missing")
    hidden, heads = int(require(meta, "embedding_length")), int(require(meta, "attention.head_count"))
    factors = source.shape("rope_freqs.weight") and source.read("rope_freqs.weight")
    stops = (source.config.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return DecoderConfig(
        vocab_size=embedding[0],
        hidden=hidden,
        layers=int(require(meta, "block_count")),
        heads=heads,
        kv_heads=int(meta.get("attention.head_count_kv") or heads),
        head_dim=int(meta.get("attention.key_length") or hidden // max(heads, 1)),
        intermediate=int(require(meta, "feed_forward_length")),
        norm_eps=float(require(meta, "attention.layer_norm_rms_epsilon")),
        rope_theta=float(meta.get("rope.freq_base", 10000.0)),
        max_positions=int(require(meta, "context_length")),
        rope_factors=() if factors is None else tuple(float(x) for x in factors),
        tied=source.shape(_NAMES["gguf"]["head"]) is None,
        stop_tokens=tuple(dict.fromkeys(int(stop) for stop in stops if stop is not None)),
    )


def rules(config: DecoderConfig, form: Format) -> Rules:
    """Where each parameter comes from."""
    names = _NAMES[form]
    made: dict[str, tuple[Part, ...]] = {
        "embedding": (Part(names["embedding"], config.vocab_size),),
        "norm.scale": (Part(names["norm"], config.hidden),),
    }
    if not config.tied:
        made["head.weight"] = (Part(names["head"], config.vocab_size),)
    for index in range(config.layers):
        part = partial(_part, names, index)
        q, k = (partial(_unpermute, heads) for heads in (config.heads, config.kv_heads))
        turned = (q, k) if form == "gguf" else (None, None)
        made |= {
            f"layers.{index}.attention_norm.scale": (part("attention_norm", config.hidden),),
            f"layers.{index}.attention.qkv.weight": (
                part("q", config.query_size, turned[0]),
                part("k", config.kv_size, turned[1]),
                part("v", config.kv_size),
            ),
            f"layers.{index}.attention.out.weight": (part("out", config.hidden),),
            f"layers.{index}.mlp_norm.scale": (part("mlp_norm", config.hidden),),
            f"layers.{index}.mlp.gate_up.weight": (
                part("gate", config.intermediate),
                part("up", config.intermediate),
            ),
            f"layers.{index}.mlp.down.weight": (part("down", config.hidden),),
        }
    return made


def _part(names: dict[str, str], index: int, name: str, rows: int, transform: Any = None) -> Part:
    return Part(names[name].format(index), rows, transform)


def _unpermute(heads: int, weight: np.ndarray) -> np.ndarray:
    """Undo llama.cpp's reordering of each head's rows from half-split to interleaved rotary pairs."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _rope_factors(rope: dict[str, Any], head_dim: int, theta: float) -> tuple[float, ...]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(require(rope, "factor")),) * (head_dim // 2)
    if kind != "llama3":
        raise InvalidArgument(f"rope scaling '{kind}' is not known; known: default, linear, llama3")
    return llama3_factors(
        head_dim,
        theta,
        float(require(rope, "factor")),
        float(require(rope, "low_freq_factor")),
        float(require(rope, "high_freq_factor")),
        int(require(rope, "original_max_position_embeddings")),
    )


FAMILY = Family(
    name="llama",
    architectures={"safetensors": ("LlamaForCausalLM",), "gguf": ("llama",)},
    configure={"safetensors": configure_hf, "gguf": configure_gguf},
    rules=rules,
)

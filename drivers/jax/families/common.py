"""What the configurations of most decoders have in common, from Hugging Face's names and from GGUF's."""

from __future__ import annotations

from typing import Any

from llmos.drivers.jax.decoder.config import Activation, require
from llmos.drivers.jax.decoder.rope import llama3_factors, longrope_scale
from llmos.drivers.jax.weights.source import Source
from llmos.ipc.errors import InvalidArgument

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def hf_fields(config: dict[str, Any], act_key: str = "hidden_act", act: str = "silu") -> dict[str, Any]:
    """Fields of ``DecoderConfig`` from a ``config.json``; a family adds or overrides its own.

    ``act_key`` and ``act`` are the activation's key and its default.
    """
    hidden, heads = int(require(config, "hidden_size")), int(require(config, "num_attention_heads"))
    head_dim = int(config.get("head_dim") or hidden // max(heads, 1))
    return {
        "vocab_size": int(require(config, "vocab_size")),
        "hidden": hidden,
        "layers": int(require(config, "num_hidden_layers")),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "intermediate": int(require(config, "intermediate_size")),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "activation": activation(config.get(act_key) or act),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "stop_tokens": hf_stops(config),
        **hf_rope(config, head_dim),
    }


def hf_stops(config: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that a ``config.json`` names."""
    stop = config.get("eos_token_id")
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),)


def hf_rope(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary base, share and scaling, which newer files keep in ``rope_parameters``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    share = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    turned = int(head_dim * float(share))
    found = {"rope_theta": theta, "rotary": 0 if turned == head_dim else turned}
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
        return found | _hf_longrope(config, rope)
    return found | {"rope_factors": rope_factors(rope, turned, theta)}


def _hf_longrope(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    longest = int(config.get("max_position_embeddings", 2048))
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if not original or not 1 < int(original) <= 1 << 24:
        raise InvalidArgument("rope scaling 'longrope' needs original_max_position_embeddings")
    scale = rope.get("attention_factor") or longrope_scale(longest, int(original))
    return {
        "rope_factors": tuple(float(x) for x in require(rope, "short_factor")),
        "rope_long_factors": tuple(float(x) for x in require(rope, "long_factor")),
        "rope_original": int(original),
        "rope_scale": float(scale),
    }


def rope_factors(rope: dict[str, Any], size: int, theta: float) -> tuple[float, ...]:
    """Divisors of the ``size // 2`` rotary frequencies; a kind of scaling that is not known is refused."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(require(rope, "factor")),) * (size // 2)
    if kind != "llama3":
        raise InvalidArgument(f"rope scaling '{kind}' is not known; known: default, linear, llama3, longrope")
    return llama3_factors(
        size,
        theta,
        float(require(rope, "factor")),
        float(require(rope, "low_freq_factor")),
        float(require(rope, "high_freq_factor")),
        int(require(rope, "original_max_position_embeddings")),
    )


def activation(name: str) -> Activation:
    """Our name of an activation; another is refused."""
    if name not in _ACTIVATIONS:
        raise InvalidArgument(f"activation '{name}' is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def hf_windows(config: dict[str, Any], *, otherwise: str = "sliding_attention") -> tuple[int, ...]:
    """Windows by layer from ``sliding_window`` and ``layer_types``; without these all are ``otherwise``."""
    window, layers = config.get("sliding_window"), int(require(config, "num_hidden_layers"))
    if not window:
        return ()
    kinds = config.get("layer_types") or [otherwise] * min(layers, 1 << 10)
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise InvalidArgument(
                f"layer type '{kind}' is not known; known: sliding_attention, full_attention"
            )
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def refuse(config: dict[str, Any], family: str, *keys: str) -> None:
    """Refuse a model that sets what its family does not have here."""
    for key in keys:
        if config.get(key):
            raise InvalidArgument(f"the {family} family is run without {key}, but it is set")


def gguf_meta(source: Source, architecture: str) -> dict[str, Any]:
    """The metadata of a GGUF file without the prefix of its architecture."""
    return {key.removeprefix(f"{architecture}."): value for key, value in source.config.items()}


def gguf_fields(source: Source, architecture: str) -> dict[str, Any]:
    """Fields of ``DecoderConfig`` from GGUF metadata; the vocabulary's size is that of the embedding."""
    meta = gguf_meta(source, architecture)
    embedding = source.shape("token_embd.weight")
    if embedding is None:
        raise InvalidArgument("tensor 'token_embd.weight' is missing")
    hidden, heads = int(require(meta, "embedding_length")), int(require(meta, "attention.head_count"))
    head_dim = int(meta.get("attention.key_length") or hidden // max(heads, 1))
    turned = int(meta.get("rope.dimension_count") or head_dim)
    stops = (source.config.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    eps = meta.get("attention.layer_norm_rms_epsilon") or meta.get("attention.layer_norm_epsilon")
    if eps is None:
        raise InvalidArgument("the model's configuration lacks 'attention.layer_norm_rms_epsilon'")
    return {
        "vocab_size": embedding[0],
        "hidden": hidden,
        "layers": int(require(meta, "block_count")),
        "heads": heads,
        "kv_heads": int(meta.get("attention.head_count_kv") or heads),
        "head_dim": head_dim,
        "intermediate": int(meta.get("feed_forward_length") or 0) or 4 * hidden,
        "norm_eps": float(eps),
        "rope_theta": float(meta.get("rope.freq_base", 10000.0)),
        "rotary": 0 if turned == head_dim else turned,
        "max_positions": int(require(meta, "context_length")),
        **_gguf_factors(source, meta, turned),
        "tied": source.shape("output.weight") is None,
        "stop_tokens": tuple(dict.fromkeys(int(stop) for stop in stops if stop is not None)),
    }


def _gguf_factors(source: Source, meta: dict[str, Any], size: int) -> dict[str, Any]:
    if source.shape("rope_freqs.weight"):
        return {"rope_factors": _floats(source, "rope_freqs.weight")}
    if source.shape("rope_factors_long.weight"):
        return {
            "rope_factors": _floats(source, "rope_factors_short.weight"),
            "rope_long_factors": _floats(source, "rope_factors_long.weight"),
            "rope_original": int(require(meta, "rope.scaling.original_context_length")),
            "rope_scale": float(meta.get("rope.scaling.attn_factor") or 1.0),
        }
    kind = meta.get("rope.scaling.type") or "none"
    if kind == "linear":
        return {"rope_factors": (float(require(meta, "rope.scaling.factor")),) * (size // 2)}
    if kind != "none":
        raise InvalidArgument(f"rope scaling '{kind}' is not known; known: none, linear, longrope")
    return {}


def _floats(source: Source, name: str) -> tuple[float, ...]:
    if source.shape(name) is None:
        raise InvalidArgument(f"tensor '{name}' is missing")
    return tuple(float(x) for x in source.read(name))


def gguf_experts(meta: dict[str, Any], inner: int) -> dict[str, Any]:
    """Fields of a mixture of experts; empty for a model that has none."""
    if not meta.get("expert_count"):
        return {}
    return {
        "experts": int(meta["expert_count"]),
        "active_experts": int(require(meta, "expert_used_count")),
        "expert_intermediate": int(meta.get("expert_feed_forward_length") or inner),
    }

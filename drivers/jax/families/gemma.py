"""Gemma 2 and 3 (text): norms around each half of a layer, alternating windows, soft caps or query norms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import gguf_fields, gguf_meta, hf_fields, hf_windows, refuse
from llmos.drivers.jax.families.layout import GGUF, HF, decoder_rules
from llmos.drivers.jax.weights.source import Source

_PERIOD = {2: 2, 3: 6}  # every so many layers one sees everything
_CAPS = {2: (50.0, 30.0), 3: (0.0, 0.0)}
_LARGEST = {2: 46, 3: 62}  # layers of the 27B models, which scale by hidden / heads
_LOCAL_THETA = 10000.0
_LAYOUT = HF.renamed(
    attention_post_norm="model.layers.{}.post_attention_layernorm",
    mlp_norm="model.layers.{}.pre_feedforward_layernorm",
    mlp_post_norm="model.layers.{}.post_feedforward_layernorm",
)


def configure_hf(version: int, source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``; what it leaves out has the defaults of transformers."""
    config = {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096, **source.config}
    refuse(config, f"gemma{version}", "attention_bias", "use_bidirectional_attention")
    ropes = config.get("rope_parameters") or {}
    theta = float(config.get("rope_local_base_freq") or _LOCAL_THETA)
    if "full_attention" in ropes:
        config["rope_parameters"] = ropes["full_attention"]
        theta = float(ropes.get("sliding_attention", {}).get("rope_theta") or theta)
    elif version == 3:
        config.setdefault("rope_theta", 1_000_000.0)
    fields = hf_fields(config, "hidden_activation", "gelu_pytorch_tanh")
    caps = _CAPS[version]
    return DecoderConfig(
        **fields,
        **_constants(version, fields["hidden"], theta),
        windows=_hf_windows(version, config),
        attention_scale=float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        attention_cap=float(config.get("attn_logit_softcapping", caps[0]) or 0.0),
        logit_cap=float(config.get("final_logit_softcapping", caps[1]) or 0.0),
    )


def configure_gguf(version: int, source: Source) -> DecoderConfig:
    """Map the metadata of a GGUF file, which leaves the period and the query scale to the reader."""
    name = f"gemma{version}"
    meta, fields = gguf_meta(source, name), gguf_fields(source, name)
    window = int(meta.get("attention.sliding_window") or 0)
    scaled = fields["layers"] == _LARGEST[version]
    return DecoderConfig(
        **fields,
        **_constants(version, fields["hidden"], float(meta.get("rope.freq_base_swa") or _LOCAL_THETA)),
        activation="gelu_tanh",
        windows=_alternate(window, fields["layers"], _PERIOD[version]) if window else (),
        attention_scale=(fields["hidden"] / fields["heads"]) ** -0.5 if scaled else 0.0,
        attention_cap=float(meta.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(meta.get("final_logit_softcapping") or 0.0),
    )


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from; llama.cpp adds the 1 that these norms lack."""
    return decoder_rules(replace(GGUF, shift=1.0) if source.format == "gguf" else _LAYOUT, config)


def _constants(version: int, hidden: int, local_theta: float) -> dict[str, Any]:
    return {
        "norm": "rms_unit",
        "post_norms": True,
        "qk_norm": version == 3,
        "embedding_scale": hidden**0.5,
        "local_theta": local_theta if version == 3 else 0.0,
    }


def _hf_windows(version: int, config: dict[str, Any]) -> tuple[int, ...]:
    found = hf_windows(config)
    if config.get("layer_types") or not found:
        return found
    period = int(config.get("sliding_window_pattern") or _PERIOD[version])
    return _alternate(found[0], len(found), max(period, 1))


def _alternate(window: int, layers: int, period: int) -> tuple[int, ...]:
    """Windows of ``layers`` layers (bounded, for the number comes from a file)."""
    return tuple(0 if (index + 1) % period == 0 else window for index in range(min(layers, 1 << 10)))


FAMILIES = [
    Family(
        name=f"gemma{version}",
        architectures={"safetensors": (f"Gemma{version}ForCausalLM",), "gguf": (f"gemma{version}",)},
        configure={
            "safetensors": partial(configure_hf, version),
            "gguf": partial(configure_gguf, version),
        },
        rules=rules,
    )
    for version in (2, 3)
]

"""How files name and lay out tensors, and the rules that follow from it for any decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Part, Rules, Transform

Made = dict[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Layout:
    """``names`` maps a role to a tensor's name, without ``.weight`` and with {} for the layer.

    A role that holds several of ours at once ("qkv", "gate_up") has precedence over its parts. ``turned``:
    query and key rows are in interleaved rotary pairs. ``shift`` is what the file adds to each norm's scale.
    ``transposed``: matrices of layers are [in, out]. The names of a file's single experts have a second {}.
    """

    names: Mapping[str, str]
    turned: bool = False
    shift: float = 0.0
    transposed: bool = False

    def renamed(self, **names: str) -> Layout:
        """The same with some roles named otherwise."""
        return replace(self, names={**self.names, **names})


HF = Layout(
    {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "model.layers.{}.input_layernorm",
        "q": "model.layers.{}.self_attn.q_proj",
        "k": "model.layers.{}.self_attn.k_proj",
        "v": "model.layers.{}.self_attn.v_proj",
        "q_norm": "model.layers.{}.self_attn.q_norm",
        "k_norm": "model.layers.{}.self_attn.k_norm",
        "out": "model.layers.{}.self_attn.o_proj",
        "mlp_norm": "model.layers.{}.post_attention_layernorm",
        "gate": "model.layers.{}.mlp.gate_proj",
        "up": "model.layers.{}.mlp.up_proj",
        "down": "model.layers.{}.mlp.down_proj",
    }
)
GGUF = Layout(
    {
        "embedding": "token_embd",
        "positions": "position_embd",
        "norm": "output_norm",
        "head": "output",
        "attention_norm": "blk.{}.attn_norm",
        "q": "blk.{}.attn_q",
        "k": "blk.{}.attn_k",
        "v": "blk.{}.attn_v",
        "q_norm": "blk.{}.attn_q_norm",
        "k_norm": "blk.{}.attn_k_norm",
        "out": "blk.{}.attn_output",
        "attention_post_norm": "blk.{}.post_attention_norm",
        "mlp_norm": "blk.{}.ffn_norm",
        "gate": "blk.{}.ffn_gate",
        "up": "blk.{}.ffn_up",
        "down": "blk.{}.ffn_down",
        "mlp_post_norm": "blk.{}.post_ffw_norm",
        "router": "blk.{}.ffn_gate_inp",
        "experts_gate": "blk.{}.ffn_gate_exps",
        "experts_up": "blk.{}.ffn_up_exps",
        "experts_down": "blk.{}.ffn_down_exps",
    }
)


def decoder_rules(layout: Layout, config: DecoderConfig) -> Rules:
    """Where each parameter of a decoder comes from."""
    made: Made = {
        "embedding": (_whole(layout, "embedding", config.vocab_size),),
        **_norm(layout, config, "norm", "norm", config.hidden),
    }
    if config.learned_positions:
        made["positions"] = (_whole(layout, "positions", config.max_positions),)
    if not config.tied:
        made["head.weight"] = (_whole(layout, "head", config.vocab_size),)
    for index in range(config.layers):
        own = replace(layout, names={role: _at(name, index) for role, name in layout.names.items()})
        layer = _attention(own, config) | _norms(own, config)
        layer |= _experts(own, config) if config.sparse(index) else _mlp(own, config)
        made |= {f"layers.{index}.{path}": parts for path, parts in layer.items()}
    return made


def _at(name: str, index: int) -> str:
    """A name for one layer; the place for an expert stays."""
    return name.replace("{}", str(index), 1)


def _norms(layout: Layout, config: DecoderConfig) -> Made:
    roles = ["attention_norm", "mlp_norm"]
    if config.post_norms:
        roles += ["attention_post_norm", "mlp_post_norm"]
    made: Made = {}
    for role in roles:
        made |= _norm(layout, config, role, role, config.hidden)
    return made


def _attention(layout: Layout, config: DecoderConfig) -> Made:
    sizes = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
    transforms: dict[str, Transform] = {}
    if layout.turned:
        transforms = {"q": partial(_unpermute, config.heads), "k": partial(_unpermute, config.kv_heads)}
    made = _linear(layout, "attention.qkv", "qkv", sizes, config.hidden, config.qkv_bias, transforms)
    out = {"out": config.hidden}
    made |= _linear(layout, "attention.out", "out", out, config.query_size, config.out_bias)
    if config.qk_norm:
        for role in ("q_norm", "k_norm"):
            made |= _norm(layout, config, f"attention.{role}", role, config.head_dim)
    return made


def _mlp(layout: Layout, config: DecoderConfig) -> Made:
    inner, bias = config.intermediate, config.mlp_bias
    first, sizes = ("gate_up", {"gate": inner, "up": inner}) if config.gated else ("up", {"up": inner})
    made = _linear(layout, f"mlp.{first}", first, sizes, config.hidden, bias)
    return made | _linear(layout, "mlp.down", "down", {"down": config.hidden}, inner, bias)


def _experts(layout: Layout, config: DecoderConfig) -> Made:
    made = _linear(layout, "mlp.router", "router", {"router": config.experts}, config.hidden, False)
    for name in ("gate", "up", "down"):
        source = f"{layout.names[f'experts_{name}']}.weight"
        if "{}" in source:
            shape = (config.expert_intermediate, config.hidden)
            own = shape[::-1] if name == "down" else shape
            each = [source.format(index) for index in range(config.experts)]
            made[f"mlp.{name}"] = tuple(Part(single, 1, _stack, own) for single in each)
        else:
            made[f"mlp.{name}"] = (Part(source, config.experts),)
    return made


def _linear(
    layout: Layout,
    path: str,
    fused: str,
    sizes: Mapping[str, int],
    inner: int,
    bias: bool,
    transforms: Mapping[str, Transform] | None = None,
) -> Made:
    """Rules of a product with ``inner`` inputs: one tensor called ``fused``, or one for each of ``sizes``."""
    if fused in layout.names:
        sizes = {fused: sum(sizes.values())}
    transforms = transforms or {}
    made: Made = {}
    if layout.transposed:
        parts = (Part(f"{layout.names[r]}.weight", n, np.transpose, (inner, n)) for r, n in sizes.items())
    else:
        parts = (Part(f"{layout.names[r]}.weight", n, transforms.get(r)) for r, n in sizes.items())
    made[f"{path}.weight"] = tuple(parts)
    if bias:
        biases = (Part(f"{layout.names[r]}.bias", n, transforms.get(r)) for r, n in sizes.items())
        made[f"{path}.bias"] = tuple(biases)
    return made


def _norm(layout: Layout, config: DecoderConfig, path: str, role: str, size: int) -> Made:
    unshift: Transform | None = partial(_add, -layout.shift) if layout.shift else None
    made: Made = {f"{path}.scale": (Part(f"{layout.names[role]}.weight", size, unshift),)}
    if config.norm == "layer":
        made[f"{path}.bias"] = (Part(f"{layout.names[role]}.bias", size),)
    return made


def _whole(layout: Layout, role: str, rows: int) -> Part:
    return Part(f"{layout.names[role]}.weight", rows)


def _unpermute(heads: int, weight: np.ndarray) -> np.ndarray:
    """Undo llama.cpp's reordering of each head's rows from half-split to interleaved rotary pairs."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _add(shift: float, scale: np.ndarray) -> np.ndarray:
    return scale.astype(np.float32) + np.float32(shift)


def _stack(weight: np.ndarray) -> np.ndarray:
    return weight[None]

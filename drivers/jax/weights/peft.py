"""LoRA adapters as PEFT saves them: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from llmos.drivers.jax.adapters.adapters import Pair, Room, Target, targets
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.weights import safetensors
from llmos.ipc.errors import InvalidArgument, NotFound

_NAME = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)\.(self_attn|attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_GATED = {"gate_proj": ("mlp.gate_up", (0,)), "up_proj": ("mlp.gate_up", (1,))}
_PLAIN = {"up_proj": ("mlp.up", (0,)), "c_fc": ("mlp.up", (0,))}
_ATTENTION = {
    "q_proj": ("attention.qkv", (0,)),
    "k_proj": ("attention.qkv", (1,)),
    "v_proj": ("attention.qkv", (2,)),
    "qkv_proj": ("attention.qkv", (0, 1, 2)),
    "c_attn": ("attention.qkv", (0, 1, 2)),
    "o_proj": ("attention.out", (0,)),
    "c_proj": ("attention.out", (0,)),
}
_MLP = {
    "gate_up_proj": ("mlp.gate_up", (0, 1)),
    "down_proj": ("mlp.down", (0,)),
    "c_proj": ("mlp.down", (0,)),
}
_UNSUPPORTED = {
    "use_dora": "weights that are decomposed (DoRA)",
    "modules_to_save": "whole modules besides the adapter",
    "rank_pattern": "ranks by module",
    "alpha_pattern": "scales by module",
    "lora_bias": "biases",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "trained embeddings",
    "target_parameters": "parameters that are no modules",
}


def read(folder: Path, room: Room) -> tuple[int, list[Pair]]:
    """An adapter's own rank, and (A, B) for each of ``targets``, in their order.

    A is [parts * rank, in] and B [out, rank], padded with zeros; the scale is in B. InvalidArgument names
    the tensor that is cut off, mis-shaped, not finite, without its partner, or for a module that is unknown.
    """
    if not folder.is_dir():
        raise NotFound(f"no adapter at {folder}: it is a folder with adapter_config.json")
    config, rank, wanted = room.config, room.rank, targets(room.config)
    own, scale, modules = _config(safetensors.read_json(folder / "adapter_config.json"), rank)
    file = safetensors.open_file(folder / "adapter_model.safetensors")
    made = {path: _zeros(target, rank, room.dtype) for path, target in wanted.items()}
    seen: set[str] = set()
    for name in sorted(file):
        path, parts, which = _resolve(name, config)
        target = wanted[path]
        partner = name.replace("lora_A", "lora_B") if which == "A" else name.replace("lora_B", "lora_A")
        if partner not in file:
            raise InvalidArgument(f"tensor '{partner}' is missing")
        sizes = [target.parts[part] for part in parts]
        expected = (own, target.inner) if which == "A" else (sum(sizes), own)
        value = _read(file[name], name, expected)
        _place(made[path], which, value * scale if which == "B" else value, target, parts, rank)
        seen.add(name.split(".")[-3])
    if missing := sorted(modules - seen):
        raise InvalidArgument(f"the adapter's configuration names {missing[0]}, and no tensor is for it")
    return own, list(made.values())


def _config(config: dict[str, Any], most: int) -> tuple[int, float, set[str]]:
    """Rank, scale, and the last parts of the names of the modules that are adapted."""
    if config.get("peft_type") != "LORA":
        raise InvalidArgument(f"an adapter of type {config.get('peft_type')} is not LoRA")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise InvalidArgument(f"the adapter has {what} ({key}), which are not supported")
    if config.get("bias", "none") != "none":
        raise InvalidArgument(f"the adapter has biases (bias is {config['bias']!r}), which are not supported")
    begin = str(config.get("init_lora_weights", True)).lower()
    if begin.startswith(("pissa", "olora", "corda", "loftq")):
        raise InvalidArgument(
            f"the adapter was begun by {begin}, which changes the model's weights: save it as a plain one "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise InvalidArgument(f"the adapter's r is {rank!r} and its lora_alpha {alpha!r}: they are numbers")
    if rank > most:
        raise InvalidArgument(f"the adapter's rank is {rank}, over {most}: raise adapter_rank of the model")
    named = config.get("target_modules")
    modules = {str(name).rpartition(".")[2] for name in named} if isinstance(named, list) else set()
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank), modules


def _resolve(name: str, config: DecoderConfig) -> tuple[str, tuple[int, ...], str]:
    """The product that a tensor is for, which of its parts, and whether it is A or B."""
    match = _NAME.fullmatch(name)
    known = _MLP | (_GATED if config.gated else _PLAIN)
    if match is not None:
        layer, block, module, which = match.groups()
        where, parts = (known if block == "mlp" else _ATTENTION).get(module, ("", ()))
        path = f"layers.{int(layer)}.{where}"
        if path in targets(config):
            return path, parts, which
    raise InvalidArgument(
        f"tensor '{name}' is for no module that can have an adapter; those of this model's "
        f"{config.layers} layers are: {', '.join(sorted({*_ATTENTION, *known}))}"
    )


def _read(tensor: safetensors.Tensor, name: str, expected: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != expected:
        raise InvalidArgument(f"tensor '{name}' has shape {list(tensor.shape)}, expected {list(expected)}")
    value = safetensors.read_tensor(name, tensor).astype(np.float32)
    if not np.isfinite(value).all():
        raise InvalidArgument(f"tensor '{name}' holds values that are not finite")
    return value


def _zeros(target: Target, rank: int, dtype: Any) -> Pair:
    shapes = (len(target.parts) * rank, target.inner), (sum(target.parts), rank)
    return np.zeros(shapes[0], dtype), np.zeros(shapes[1], dtype)


def _place(
    pair: Pair, which: str, value: np.ndarray, target: Target, parts: tuple[int, ...], rank: int
) -> None:
    """Put a tensor where its parts are: A once for each of them, B's rows as they are fused."""
    a, b = pair
    if which == "A":
        for part in parts:
            a[part * rank : part * rank + len(value)] = value
    else:
        first = sum(target.parts[: parts[0]])
        b[first : first + len(value), : value.shape[1]] = value

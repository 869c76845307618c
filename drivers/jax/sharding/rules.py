"""Which axis of a parameter lies on which axes of the mesh, and in what order fused rows lie there.

Parameters are saved, restored and converted in one order whatever the mesh: queries, keys, values; gate,
up. A device needs whole heads and a gate with its own up, so ``arrange`` reorders the fused rows, on the
devices, once they are there: all that belongs to the first device, then the second's, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.experts import Experts
from llmos.drivers.jax.decoder.modules import Decoder
from llmos.drivers.jax.sharding.collectives import Split
from llmos.drivers.jax.sharding.mesh import Axes

Arrange = Callable[[jax.Array], jax.Array]
_COLUMNS = re.compile(r"embedding|head\.\w+|.*\.attention\.qkv\.\w+|.*\.mlp\.(gate_up|up)\.\w+")
_ROWS = re.compile(r".*\.(attention\.out|mlp\.down)\.\w+")
_EXPERTS = re.compile(r".*\.mlp\.((?:gate|up|down)(?:_scale)?)")


def local_config(config: DecoderConfig, axes: Axes) -> DecoderConfig:
    """What one device computes; its layers of experts are made whole and cut by their parameters alone."""
    return replace(config, heads=config.heads // axes.parts, kv_heads=max(1, config.kv_heads // axes.parts))


def stored_config(config: DecoderConfig, axes: Axes) -> DecoderConfig:
    """What all devices of a mesh store together: KV heads are repeated where there are fewer than parts."""
    return replace(config, kv_heads=max(config.kv_heads, axes.parts))


def cut(decoder: Decoder, axes: Axes) -> None:
    """Tell the modules of a decoder what their parameters are parts of."""
    split = decoder.split = Split(axes.wide, axes.named("expert"))
    for layer in decoder.layers:
        layer.attention.out.join = axes.heads
        if isinstance(layer.mlp, Experts):
            layer.mlp.split = split
        else:
            layer.mlp.down.join = axes.wide


def spec(*axes: tuple[str, ...] | None) -> PartitionSpec:
    """Which axes of the mesh each axis of an array is cut over; those not named are whole."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def spec_of(path: str, rank: int, axes: Axes) -> PartitionSpec:
    """Where the axes of a parameter lie; what is not named by a rule is on every device.

    A row-parallel product's weight is cut by its inputs; what else it has (a bias) belongs to its outputs.
    """
    over = axes.heads if ".attention." in path else axes.wide
    if _COLUMNS.fullmatch(path):
        return spec(over)
    if _ROWS.fullmatch(path):
        return spec(None, over) if rank > 1 else spec()
    if match := _EXPERTS.fullmatch(path):
        expert, inner = axes.named("expert"), axes.named("sequence", "tensor")
        cuts = {"down": spec(expert, None, inner), "down_scale": spec(expert)}
        return cuts.get(match[1], spec(expert, inner))
    return spec()


def arrangement(path: str, config: DecoderConfig, axes: Axes) -> Arrange | None:
    """How the rows of a parameter are reordered, repeated or padded for a mesh; None: not at all."""
    if ".attention.qkv." in path and axes.parts > 1:
        sizes, parts = [config.query_size, config.kv_size, config.kv_size], axes.parts
        repeats = max(1, parts // config.kv_heads)
        return lambda x: _interleave(x, sizes, [1, repeats, repeats], parts)
    if ".mlp.gate_up." in path and axes.slices > 1:
        return lambda x: _interleave(x, [config.intermediate] * 2, [1, 1], axes.slices)
    missing = -config.vocab_size % axes.slices
    if missing and (path == "embedding" or path.startswith("head.")):
        return lambda x: jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
    return None


def _interleave(fused: jax.Array, sizes: list[int], repeats: list[int], parts: int) -> jax.Array:
    """Rows of all ``sizes``, part by part; where a size has fewer parts, each of them is repeated."""
    pieces, at = [], 0
    for size, times in zip(sizes, repeats, strict=True):
        rows = fused[at : at + size].reshape(parts // times, -1, *fused.shape[1:])
        pieces.append(jnp.repeat(rows, times, axis=0))
        at += size
    whole: Any = jnp.concatenate(pieces, axis=1)
    return jnp.reshape(whole, (-1, *fused.shape[1:]))

"""One Pallas (Triton) kernel for all that is between two products of a decode step: it norms (where a model
does) and turns the queries and the key of each row's new token, writes key and value to their page, and
attends.

As in ``paged``, a program takes a row, a KV head and a split of the row's pages. The last split has the new
token: from registers, so that nothing of a page is read that the step writes. The pages are an input and an
output in one buffer, which XLA need not copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmos.drivers.jax.attention.caches import Cache, PagedCache, PooledCache
from llmos.drivers.jax.attention.paged import MASKED, Tiling, join, outputs, page, scored, tiling, whole, wide
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, Scoring
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.layers import RMSNorm
from llmos.drivers.jax.decoder.modules import struct


def suits(cache: Cache, new: Projected) -> bool:
    """Whether the kernel can do it: pages are not of 8 bits, and there is something to turn."""
    known = all(isinstance(norm, RMSNorm) for norm in new.norms or ())
    return cache.k_scale is None and new.turn.cos.shape[-1] > 0 and known


def turned_attention(
    plan: DecodePlan,
    cache: Cache,
    new: Projected,
    *,
    scoring: Scoring = PLAIN,
    splits: int = 1,
    warps: int = 4,
    stages: int = 2,
    interpret: bool = False,
) -> tuple[jax.Array, Cache]:
    """Attend from the new tokens [B], which are in ``new``, as ``Paged.decode`` does.

    Returns the output [B, heads, head_dim], and the cache with their keys and values.

    Raises ValueError where the shapes do not fit together.
    """
    _check(plan, cache, new)
    rows, _, head_dim = new.fused.shape
    like = struct((rows, 1, new.heads, head_dim), new.fused.dtype)
    held = [cache.blocks] if isinstance(cache, PooledCache) else [cache.k, cache.v]
    tile = tiling(1, new.heads // new.kv_heads, head_dim, splits, scoring)
    specs, shapes = outputs(like, splits)
    given = [plan.tables, plan.lengths, plan.pages, plan.offsets, new.fused, *new.turn]
    norms = [norm for norm in new.norms or () if isinstance(norm, RMSNorm)]
    given += [norm.scale[...] for norm in norms]
    given += [cache.first.reshape(1)] if isinstance(cache, PooledCache) else []
    results = pl.pallas_call(
        partial(_kernel, tile=tile, kv_heads=new.kv_heads, norms=[(norm.eps, norm.unit) for norm in norms]),
        grid=(rows, new.kv_heads, splits),
        in_specs=[*(_own(part) for part in given[:7]), *(whole(part) for part in (*given[7:], *held))],
        out_specs=[*specs, *(whole(part) for part in held)],
        out_shape=[*shapes, *(struct(part.shape, part.dtype) for part in held)],
        input_output_aliases={len(given) + n: len(specs) + n for n in range(len(held))},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="turned_attention",
    )(*given, *held)
    found, held = results[: len(specs)], results[len(specs) :]
    out = found[0] if splits == 1 else join(found, like, interpret)
    return out[:, 0], cache.written(held[0]) if isinstance(cache, PooledCache) else PagedCache(*held)


def _check(plan: DecodePlan, cache: Cache, new: Projected) -> None:
    rows, _, head_dim = new.fused.shape
    _, kv_heads, _, cached_dim = cache.k.shape
    fits = all(part.shape[0] == rows for part in (*plan, *new.turn))
    cos, sin = new.turn
    turns = cos.shape == sin.shape and 2 * cos.shape[-1] <= head_dim
    if kv_heads != new.kv_heads or new.heads % kv_heads or cached_dim != head_dim or not (fits and turns):
        raise ValueError(
            f"heads {new.fused.shape} with 2 * {new.kv_heads} of keys and values, pages {cache.k.shape}, "
            f"turns {cos.shape}, plan {[part.shape for part in plan]}"
        )


def _own(part: jax.Array) -> pl.BlockSpec:
    """A row's part of an array, for the programs of that row."""
    if part.ndim == 1:
        return pl.BlockSpec((1,), lambda b, h, s: (b,))
    return pl.BlockSpec((None, *part.shape[1:]), lambda b, h, s: (b,) + (0,) * (part.ndim - 1))


def _kernel(
    tables: Any,  # [width]
    lengths: Any,  # [1]
    into: Any,  # [1], the page that is written
    offsets: Any,  # [1]
    fused: Any,  # [heads + 2 * kv_heads, head_dim]
    cos: Any,  # [n / 2]
    sin: Any,
    *rest: Any,  # scales of norms [head_dim], if there are any; keys and values [pages, kv_heads,
    # page_tokens, head_dim], or ``first`` [1] and both in one array; the results; the pages, to be written
    tile: Tiling,
    kv_heads: int,
    norms: list[tuple[float, bool]],  # of queries and keys: epsilon, and whether the scale lacks its 1
) -> None:
    scales, rest = rest[: len(norms)], rest[len(norms) :]
    normed: list[Any] = [(scale, *norm) for scale, norm in zip(scales, norms, strict=True)] or [None, None]
    paired = rest[0].ndim == 1
    held = rest[1:2] * 2 if paired else rest[:2]
    written = rest[-1:] * 2 if paired else rest[-2:]
    results = rest[2:-1] if paired else rest[2:-2]
    beside = (rest[0][0], rest[0][0] + 1) if paired else (0, 0)
    head, split, heads = pl.program_id(1), pl.program_id(2), fused.shape[0] - 2 * kv_heads
    row = jnp.arange(tile.rows)
    real = row < tile.group
    q = _turned(fused, head * tile.group + row, real, (cos, sin), normed[0], tile.size)
    one, every = jnp.zeros((1,), jnp.int32) + head, jnp.ones((1,), jnp.bool_)
    k = _turned(fused, heads + one, every, (cos, sin), normed[1], tile.size).astype(held[0].dtype)
    v = _values(fused, heads + kv_heads + one, every, tile.size).astype(held[1].dtype)
    last = split == tile.splits - 1
    for part, new, number in zip(written, (k, v), (into[0] + beside[0], into[0] + beside[1]), strict=True):
        _write(part, new, number, offsets[0], head, last)
    old = jnp.maximum(lengths[0] - 1, 0)
    begin, end = _share(lengths[0], old, split, tile, held[0].shape[2])
    limit = jnp.zeros((tile.rows,), jnp.int32) + old
    oldest = limit + 1 - tile.scoring.window if tile.scoring.window else None
    top, total, acc = jax.lax.fori_loop(
        begin,
        end,
        partial(page, tables, q, held, beside, (), head, (oldest, limit), tile.scoring),
        _first(
            q, k.astype(q.dtype), v.astype(q.dtype), last & (lengths[0] > 0), tile.scoring, fused.shape[1]
        ),
    )
    where = (jnp.zeros((tile.rows,), jnp.int32), head * tile.group + row)
    if tile.splits == 1:
        acc = (acc / jnp.maximum(total, 1e-30)[:, None]).astype(results[0].dtype)
    else:
        plgpu.store(results[1].at[where], top, mask=real)
        plgpu.store(results[2].at[where], total, mask=real)
    mask = real[:, None] & (jnp.arange(tile.size) < fused.shape[1])[None, :]
    plgpu.store(results[0].at[wide(where, tile.size)], acc, mask=mask)


def _values(fused: Any, at: Any, real: Any, size: int) -> Any:
    """The heads ``at`` [rows] as they are, [rows, size] with zeros for what is not there."""
    mask = real[:, None] & (jnp.arange(size) < fused.shape[1])[None, :]
    return plgpu.load(fused.at[wide((at,), size)], mask=mask, other=0.0)


def _turned(fused: Any, at: Any, real: Any, turn: tuple[Any, Any], norm: Any, size: int) -> Any:
    """The heads ``at`` [rows], normed and turned: each number with the one that it is turned with."""
    half, column = turn[0].shape[0], jnp.arange(size)
    moved, first = column < 2 * half, column < half
    across = jnp.where(first, column + half, column - half)
    pairs = tuple(jnp.broadcast_to(x, (at.shape[0], size)) for x in (at[:, None], across[None, :]))
    other = plgpu.load(fused.at[pairs], mask=real[:, None] & moved[None, :], other=0.0).astype(jnp.float32)
    plain = _values(fused, at, real, size).astype(jnp.float32)
    if norm is not None:
        factor = jax.lax.rsqrt((plain * plain).sum(axis=1) / fused.shape[1] + norm[1])[:, None]
        plain = _normed(plain * factor, norm, column, column < fused.shape[1], fused.dtype)
        other = _normed(other * factor, norm, across, moved, fused.dtype)
    angle = jnp.where(first, column, column - half)
    cos = plgpu.load(turn[0].at[angle], mask=moved, other=1.0)
    sin = plgpu.load(turn[1].at[angle], mask=moved, other=0.0)
    return (plain * cos[None, :] + other * jnp.where(first, -sin, sin)[None, :]).astype(fused.dtype)


def _normed(x: Any, norm: Any, column: Any, there: Any, dtype: Any) -> Any:
    """``x`` [rows, size] times the scale of its columns, rounded as ``RMSNorm`` does."""
    scale = plgpu.load(norm[0].at[column], mask=there, other=0.0).astype(jnp.float32)[None, :]
    scaled = x * (1.0 + scale) if norm[2] else x.astype(dtype).astype(jnp.float32) * scale
    return scaled.astype(dtype).astype(jnp.float32)


def _write(part: Any, new: Any, number: Any, offset: Any, head: Any, last: Any) -> None:
    """Put ``new`` [1, size] of a head into page ``number``, which is dropped if there is none."""
    zero, size = jnp.zeros((1,), jnp.int32), new.shape[1]
    mask = (jnp.arange(size) < part.shape[3])[None, :] & (last & (number < part.shape[0]))
    plgpu.store(part.at[wide((zero + number, zero + head, zero + offset), size)], new, mask=mask)


def _share(length: Any, old: Any, split: Any, tile: Tiling, page_tokens: int) -> tuple[Any, Any]:
    """The pages, from the first to before the last, in which a split looks for the ``old`` tokens."""
    first = jnp.maximum(length - tile.scoring.window, 0) // page_tokens if tile.scoring.window else 0
    last = pl.cdiv(old, page_tokens)
    share = pl.cdiv(jnp.maximum(last - first, 0), tile.splits)
    begin = first + split * share
    return begin, jnp.minimum(begin + share, last)


def _first(q: Any, k: Any, v: Any, there: Any, scoring: Scoring, head_dim: int) -> tuple[Any, Any, Any]:
    """A running softmax that has seen the new token [1, size], or nothing if it is not ``there``."""
    products = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=1)
    top = jnp.where(there, scored(products, scoring, head_dim), MASKED)
    weight = jnp.where(there, jnp.ones((q.shape[0],), jnp.float32), 0.0)
    return top, weight, weight[:, None] * v.astype(jnp.float32)

"""One Pallas (Triton) kernel for attention over pages: one new token of each row, a few guesses, or a chunk.

Flash decoding (Dao et al., 2023) over pages. A program takes one row, one KV head, one block of the row's
queries and one split of its pages. It reads the pages that its queries can see, each key and value byte once
for all query heads of the group; a row's splits are joined by their log-sum-exp. Splits keep all
multiprocessors busy when rows are few. What Triton's matrix products are larger than the work (a group has
fewer query heads than they have rows at least; a head may not have a power of two of values) is masked in
registers, so that nothing is padded in memory. 8-bit pages are converted in registers; the scales of keys
multiply scores, those of values the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmos.drivers.jax.attention.caches import Cache, PooledCache
from llmos.drivers.jax.attention.plans import PLAIN, Scoring
from llmos.drivers.jax.decoder.modules import struct

LEAST = 16  # rows and columns of a matrix product in Triton
MOST_VALUES = 1 << 14  # of the queries that one program holds: their sums fill a quarter of its registers
PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
MASKED = -1e30
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: ``queries`` tokens of a row for each program, its pages in ``splits``.

    A program's matrix products have ``rows``, queries times ``group`` (the query heads of a KV head), and
    are ``size``, the values of a head, wide: each with what makes it a power of two.
    """

    queries: int
    group: int
    rows: int
    size: int
    splits: int
    scoring: Scoring


def split_count(rows: int, kv_heads: int, pages: int) -> int:
    """Into how many parts each row's pages are split: a power of two, so that ``PROGRAMS`` run at once."""
    wanted = max(1, PROGRAMS // (rows * kv_heads))
    return min(1 << (wanted - 1).bit_length() if wanted > 1 else 1, max(1, pages))


def tiling(queries: int, group: int, head_dim: int, splits: int, scoring: Scoring) -> Tiling:
    """As many queries to a program as fit into its registers."""
    size = _power(head_dim)
    rows = min(_power(queries * group), max(_power(group), MOST_VALUES // size))
    return Tiling(min(queries, rows // group), group, rows, size, splits, scoring)


def _power(count: int) -> int:
    """The power of two from ``LEAST`` on that ``count`` fits into."""
    return max(LEAST, 1 << (count - 1).bit_length())


def paged_attention(
    q: jax.Array,
    cache: Cache,
    tables: jax.Array,
    lengths: jax.Array,
    visible: jax.Array | None = None,
    *,
    scoring: Scoring = PLAIN,
    splits: int = 1,
    warps: int = 4,
    stages: int = 2,
    interpret: bool = False,
) -> jax.Array:
    """Attend from q [B, C, heads, head_dim] over the first ``lengths`` [B] tokens of each row's pages.

    ``tables`` [B, width] are page ids. The first query of a row sees the first ``visible`` [B] tokens (by
    default all), each later one a token more, and of these the last ``scoring.window``.

    Raises ValueError where the shapes do not fit together.
    """
    visible = lengths if visible is None else visible
    _check(q, cache, tables, lengths, visible)
    rows, queries, heads, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    tile = tiling(queries, heads // kv_heads, head_dim, splits, scoring)
    specs, shapes = outputs(q, splits)
    if isinstance(cache, PooledCache):
        parts = [cache.blocks, cache.blocks, cache.first.reshape(1)]
    else:
        parts = [part for part in cache if part is not None]
    results = pl.pallas_call(
        partial(_kernel, tile=tile, paired=isinstance(cache, PooledCache)),
        grid=(rows, kv_heads, pl.cdiv(queries, tile.queries) * splits),
        in_specs=[
            pl.BlockSpec((None, tables.shape[1]), lambda b, h, s: (b, 0)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
            pl.BlockSpec((None, *q.shape[1:]), lambda b, h, s: (b, 0, 0, 0)),
            *(whole(part) for part in parts),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="paged_attention",
    )(tables, lengths, visible, q, *parts)
    out: jax.Array = results[0] if splits == 1 else join(results, q, interpret)
    return out


def _check(q: jax.Array, cache: Cache, tables: jax.Array, lengths: jax.Array, visible: jax.Array) -> None:
    rows, _, heads, head_dim = q.shape
    _, kv_heads, _, cached_dim = cache.k.shape
    fits = lengths.shape == visible.shape == (rows,) and tables.shape[0] == rows
    if heads % kv_heads or cached_dim != head_dim or not fits:
        raise ValueError(
            f"q {q.shape}, pages {cache.k.shape}, tables {tables.shape}, lengths {lengths.shape}, "
            f"visible {visible.shape}"
        )


def whole(part: jax.Array) -> pl.BlockSpec:
    """All of an array, for every program."""
    return pl.BlockSpec(part.shape, lambda b, h, s: (0,) * part.ndim)


def outputs(q: jax.Array, splits: int) -> tuple[list[pl.BlockSpec], list[Any]]:
    """What the kernel writes: the output, or for each split its mixed values, their maxima and their sums."""
    if splits == 1:
        return [pl.BlockSpec((None, *q.shape[1:]), lambda b, h, s: (b, 0, 0, 0))], [struct(q.shape, q.dtype)]
    spec = pl.BlockSpec((None, None, *q.shape[1:3]), lambda b, h, s: (s % splits, b, 0, 0))
    mixed = pl.BlockSpec((None, None, *q.shape[1:]), lambda b, h, s: (s % splits, b, 0, 0, 0))
    part = struct((splits, *q.shape[:3]), jnp.float32)
    return [mixed, spec, spec], [struct((splits, *q.shape), jnp.float32), part, part]


def _kernel(
    tables: Any,  # [width]
    lengths: Any,  # [1]
    visible: Any,  # [1]
    q_ref: Any,  # [queries, heads, head_dim]
    k_pages: Any,  # [pages, kv_heads, page_tokens, head_dim]
    v_pages: Any,
    *rest: Any,  # ``first`` [1] if paired; of 8-bit pages k_scale and v_scale [pages, kv_heads, page_tokens];
    # then the results
    tile: Tiling,
    paired: bool,
) -> None:
    count = 1 if tile.splits == 1 else 3
    scales, results = rest[:-count], rest[-count:]
    beside = (0, 0)
    if paired:
        beside, scales = (scales[0][0], scales[0][0] + 1), ()
    head, split = pl.program_id(1), pl.program_id(2) % tile.splits
    row = jnp.arange(tile.rows)
    offset = row // tile.group
    query = pl.program_id(2) // tile.splits * tile.queries + offset
    where = (query, head * tile.group + row % tile.group)
    real = (offset < tile.queries) & (query < q_ref.shape[0])
    at, mask = wide(where, tile.size), real[:, None] & (jnp.arange(tile.size) < q_ref.shape[2])[None, :]
    q = plgpu.load(q_ref.at[at], mask=mask, other=0.0)
    limit = jnp.minimum(visible[0] + query, lengths[0])
    oldest = limit - tile.scoring.window if tile.scoring.window else None
    first, last = _span(lengths[0], visible[0], tile, k_pages.shape[2])
    share = pl.cdiv(last - first, tile.splits)
    begin = first + split * share
    top, total, acc = jax.lax.fori_loop(
        begin,
        jnp.minimum(begin + share, last),
        partial(page, tables, q, (k_pages, v_pages), beside, scales, head, (oldest, limit), tile.scoring),
        (
            jnp.full((tile.rows,), MASKED, jnp.float32),
            jnp.zeros((tile.rows,), jnp.float32),
            jnp.zeros((tile.rows, q.shape[1]), jnp.float32),
        ),
    )
    if tile.splits == 1:
        acc = (acc / jnp.maximum(total, 1e-30)[:, None]).astype(results[0].dtype)
    else:
        plgpu.store(results[1].at[where], top, mask=real)
        plgpu.store(results[2].at[where], total, mask=real)
    plgpu.store(results[0].at[at], acc, mask=mask)


def wide(where: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Indices [rows] of the first axes as indices [rows, size] of all."""
    shape = (where[0].shape[0], size)
    parts = (*(part[:, None] for part in where), jnp.arange(size)[None, :])
    return tuple(jnp.broadcast_to(part, shape) for part in parts)


def _span(length: Any, visible: Any, tile: Tiling, page_tokens: int) -> tuple[Any, Any]:
    """The pages, from the first to before the last, that the queries of a program can see."""
    before = pl.program_id(2) // tile.splits * tile.queries
    end = jnp.minimum(visible + before + tile.queries - 1, length)
    begin = jnp.maximum(visible + before - tile.scoring.window, 0) if tile.scoring.window else 0
    return jnp.minimum(begin, end) // page_tokens, pl.cdiv(end, page_tokens)


def page(
    tables: Any,
    q: Any,  # [rows, head_dim]
    pages: tuple[Any, Any],
    beside: tuple[Any, Any],  # where keys and values are, from a page's number on
    scales: tuple[Any, ...],
    head: Any,
    seen: tuple[Any, Any],  # [rows] each, the first token that each sees (None: the very first) and the end
    scoring: Scoring,
    index: Any,
    carry: Any,
) -> Any:
    """One page more of a running softmax, its maxima and sums to the base of 2."""
    top, total, acc = carry
    number = tables[index]
    scores = plgpu.dot(q, _read(pages[0], number + beside[0], head, q).T)
    if scales:
        scores = scores * scales[0][number, head][None, :]
    scores = scored(scores, scoring, pages[0].shape[3])
    place = (index * scores.shape[1] + jnp.arange(scores.shape[1]))[None, :]
    oldest, end = seen
    inside = place < end[:, None]
    if oldest is not None:
        inside &= place >= oldest[:, None]
    # What sees nothing yet counts a page of zeros, which weighs nothing once it sees something.
    scores = jnp.where(inside, scores, MASKED)
    peak = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp2(scores - peak[:, None])
    decay = jnp.exp2(top - peak)
    total = total * decay + weights.sum(axis=-1)
    if scales:
        weights = weights * scales[1][number, head][None, :]
    mixed = plgpu.dot(weights.astype(q.dtype), _read(pages[1], number + beside[1], head, q))
    return peak, total, acc * decay[:, None] + mixed


def scored(products: Any, scoring: Scoring, head_dim: int) -> Any:
    """Scores to the base of 2, of the products of queries and keys."""
    factor = scoring.scale or head_dim**-0.5
    if scoring.cap:
        return jnp.tanh(products * (factor / scoring.cap)) * (scoring.cap * _LOG2E)
    return products * (factor * _LOG2E)


def _read(pages: Any, page: Any, head: Any, q: Any) -> Any:
    """A page of one head [page_tokens, size], as wide as ``q`` and of its dtype."""
    (tokens, head_dim), size = pages.shape[2:], q.shape[1]
    if head_dim == size:
        return pages[page, head].astype(q.dtype)
    zero = jnp.zeros((tokens,), jnp.int32)
    where = wide((zero + page, zero + head, jnp.arange(tokens)), size)
    mask = jnp.broadcast_to((jnp.arange(size) < head_dim)[None, :], (tokens, size))
    return plgpu.load(pages.at[where], mask=mask, other=jnp.zeros((), pages.dtype)).astype(q.dtype)


def join(parts: list[jax.Array], like: jax.Array, interpret: bool) -> jax.Array:
    """Join the splits, axis 0, by their running maxima (in log2) and sums, in one kernel: XLA makes four."""
    acc, top, total = parts
    splits, size = acc.shape[0], acc.shape[-1]
    heads = top.size // splits
    column = pl.BlockSpec((splits, None), lambda n: (0, n))
    joined: jax.Array = pl.pallas_call(
        _join_kernel,
        grid=(heads,),
        in_specs=[pl.BlockSpec((splits, None, size), lambda n: (0, n, 0)), column, column],
        out_specs=pl.BlockSpec((None, size), lambda n: (n, 0)),
        out_shape=struct((heads, size), like.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="join_splits",
    )(acc.reshape(splits, heads, size), top.reshape(splits, heads), total.reshape(splits, heads))
    return joined.reshape(like.shape)


def _join_kernel(acc_ref: Any, top_ref: Any, total_ref: Any, out_ref: Any) -> None:
    splits, size = acc_ref.shape  # and [splits] twice; the result is [size]
    split, place = jnp.arange(_power(splits)), jnp.arange(_power(size))
    real = split < splits
    top = plgpu.load(top_ref.at[split], mask=real, other=MASKED)
    share = jnp.exp2(top - top.max(axis=0))
    total = (plgpu.load(total_ref.at[split], mask=real, other=0.0) * share).sum(axis=0)
    mask = real[:, None] & (place < size)[None, :]
    acc = plgpu.load(acc_ref.at[wide((split,), place.shape[0])], mask=mask, other=0.0)
    mixed = (acc * share[:, None]).sum(axis=0) / jnp.maximum(total, 1e-30)
    plgpu.store(out_ref.at[place], mixed.astype(out_ref.dtype), mask=place < size)

"""Paged attention for NVIDIA GPUs: our own decode kernel in Pallas (Triton), cuDNN for prompts.

Decode is flash decoding (Dao et al., 2023) over pages: one program for each (row, KV head, split) reads the
pages that its row really has, each key and value byte once, for all query heads of the group; a row's
splits are joined by their log-sum-exp. Splits keep all multiprocessors busy when rows are few. 8-bit pages
are converted in registers; the scales of keys multiply scores, those of values the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmos.drivers.jax.attention import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.xla import PagedCache, XlaAttention, packed, write
from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.modules import struct

GROUP_ROWS = 16  # the least rows of a matrix product in Triton; query heads of a group are padded to it
PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
_MASKED = -1e30
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class PallasAttention:
    """``fresh`` is what computes a prompt's first chunk, which needs no page."""

    warps: int = 4
    stages: int = 2
    fresh: Literal["cudnn", "xla"] = "cudnn"
    interpret: bool = False
    name: str = "pallas+cudnn"
    knows_fresh: bool = True
    _xla: XlaAttention = field(default_factory=lambda: XlaAttention(tokens_in_flight=8192))

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PagedCache]:
        return self._xla.allocate(config, pages, page_tokens, dtype)

    def scrub(self, cache: PagedCache, pages: jax.Array) -> PagedCache:
        return self._xla.scrub(cache, pages)

    def decode(
        self,
        plan: DecodePlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        if scoring != PLAIN:
            return self._xla.decode(plan, cache, q, k, v, scoring)
        cache = write(cache, plan.pages, plan.offsets, k, v)
        return self._attend(plan.tables, plan.lengths, cache, q[:, None])[:, 0], cache

    def verify(
        self,
        plan: VerifyPlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        if scoring != PLAIN:
            return self._xla.verify(plan, cache, q, k, v, scoring)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        cache = write(cache, plan.pages.reshape(-1), plan.offsets.reshape(-1), *flat)
        return self._attend(plan.tables, plan.lengths, cache, q, plan.starts + 1), cache

    def _attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        cache: PagedCache,
        q: jax.Array,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        return paged_decode(
            q,
            cache.k,
            cache.v,
            tables,
            lengths,
            visible,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            splits=split_count(q.shape[0], cache.k.shape[1], tables.shape[1]),
            warps=self.warps,
            stages=self.stages,
            interpret=self.interpret,
        )

    def prefill(
        self,
        plan: PrefillPlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        if not fresh or scoring != PLAIN:
            return self._xla.prefill(plan, cache, q, k, v, scoring=scoring)
        cache = write_pages(cache, plan, k, v)
        # The chunk attends to itself alone; what pads it comes after all that counts.
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.fresh), cache


def write_pages(cache: PagedCache, plan: PrefillPlan, k: jax.Array, v: jax.Array) -> PagedCache:
    """Put k and v [R, C, kv_heads, head_dim] of rows that start at position 0 into their pages, page by page.

    Token by token this costs ten times as much. What pads a row's last page is overwritten as it grows.
    """
    rows, chunk, kv_heads = k.shape[:3]
    page_tokens, pages = cache.k.shape[2], -(-chunk // cache.k.shape[2])
    padding = ((0, 0), (0, pages * page_tokens - chunk), (0, 0))
    width = min(pages, plan.tables.shape[1])
    used = jnp.arange(width) * page_tokens < plan.lengths[:, None]
    ids = jnp.where(used, plan.tables[:, :width], cache.k.shape[0]).reshape(-1)

    def put(part: jax.Array, new: jax.Array) -> jax.Array:
        rest = new.shape[3:]
        padded = jnp.pad(new, padding + ((0, 0),) * len(rest))
        blocks = padded.reshape(rows, pages, page_tokens, kv_heads, *rest)[:, :width]
        blocks = blocks.swapaxes(2, 3).reshape(-1, kv_heads, page_tokens, *rest)
        return part.at[ids].set(blocks, mode="drop", unique_indices=True)

    stored: PagedCache = jax.tree.map(put, cache, packed(cache, k, v))
    return stored


def split_count(rows: int, kv_heads: int, pages: int) -> int:
    """Into how many parts each row's pages are split: a power of two, so that ``PROGRAMS`` run at once."""
    wanted = max(1, PROGRAMS // (rows * kv_heads))
    return min(1 << (wanted - 1).bit_length() if wanted > 1 else 1, max(1, pages))


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    visible: jax.Array | None = None,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    splits: int,
    warps: int = 4,
    stages: int = 3,
    interpret: bool = False,
) -> jax.Array:
    """C queries for each of B rows over its pages, which are read once for all of them.

    q [B, C, heads, head_dim]; k_pages and v_pages [pages, kv_heads, page_tokens, head_dim]; tables [B, width]
    of page ids; lengths [B], 0 for a row that is not live, whose output is zero. The first query of a row
    sees ``visible`` [B] tokens (None: all), each further one a token more. 8-bit pages have ``k_scale`` and
    ``v_scale`` [pages, kv_heads, page_tokens]. Returns an array like q.
    Raises ValueError where the shapes do not fit together.
    """
    rows, queries, heads, head_dim = q.shape
    _, kv_heads, _, cached_dim = k_pages.shape
    visible = lengths if visible is None else visible
    fits = lengths.shape == visible.shape == (rows,) and tables.shape[0] == rows
    if heads % kv_heads or cached_dim != head_dim or not fits:
        raise ValueError(
            f"q {q.shape}, pages {k_pages.shape}, tables {tables.shape}, lengths {lengths.shape}, "
            f"visible {visible.shape}"
        )
    group = heads // kv_heads
    used = queries * group
    padded = max(GROUP_ROWS, 1 << (used - 1).bit_length())
    grouped = q.reshape(rows, queries, kv_heads, group, head_dim).swapaxes(1, 2)
    grouped = grouped.reshape(rows, kv_heads, used, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padded - used), (0, 0)))
    whole = pl.BlockSpec(k_pages.shape, lambda b, h, s: (0, 0, 0, 0))
    scales = [] if k_scale is None else [k_scale, v_scale]
    all_scales = pl.BlockSpec(k_pages.shape[:3], lambda b, h, s: (0, 0, 0))
    partial_spec = pl.BlockSpec((None, None, None, padded), lambda b, h, s: (s, b, h, 0))
    acc, top, total = pl.pallas_call(
        partial(_decode_kernel, splits=splits, group=group if queries > 1 else 0, scale=head_dim**-0.5),
        grid=(rows, kv_heads, splits),
        in_specs=[
            pl.BlockSpec((None, tables.shape[1]), lambda b, h, s: (b, 0)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
            pl.BlockSpec((None, None, padded, head_dim), lambda b, h, s: (b, h, 0, 0)),
            whole,
            whole,
            *([all_scales] * len(scales)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, padded, head_dim), lambda b, h, s: (s, b, h, 0, 0)),
            partial_spec,
            partial_spec,
        ],
        out_shape=[
            struct((splits, rows, kv_heads, padded, head_dim), jnp.float32),
            struct((splits, rows, kv_heads, padded), jnp.float32),
            struct((splits, rows, kv_heads, padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="paged_decode",
    )(tables, lengths, visible, grouped, k_pages, v_pages, *scales)
    out = _join(acc, top, total)[:, :, :used].reshape(rows, kv_heads, queries, group, head_dim)
    return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


def _decode_kernel(
    tables: Any,  # [width]
    lengths: Any,  # [1]
    visible: Any,  # [1]
    q_ref: Any,  # [padded, head_dim]
    k_pages: Any,  # [pages, kv_heads, page_tokens, head_dim]
    v_pages: Any,
    *rest: Any,  # of 8-bit pages k_scale and v_scale [pages, kv_heads, page_tokens]; then the results
    splits: int,
    group: int,  # query heads of a token, 0 if there is one token only
    scale: float,
) -> None:
    *scales, acc_ref, top_ref, total_ref = rest  # [padded, head_dim], [padded], [padded]
    head, split = pl.program_id(1), pl.program_id(2)
    page_tokens = k_pages.shape[2]
    length = lengths[0]
    pages = pl.cdiv(length, page_tokens)
    share = pl.cdiv(pages, splits)
    first = split * share
    last = jnp.minimum(first + share, pages)
    q = q_ref[...]
    padded, head_dim = q.shape
    if group:
        # A split in which a query sees nothing weighs nothing when the splits are joined.
        limit = jnp.minimum(visible[0] + jax.lax.div(jnp.arange(padded), group), length)

    def body(index: Any, carry: Any) -> Any:
        top, total, acc = carry
        page = tables[index]
        k = k_pages[page, head].astype(q.dtype)
        scores = plgpu.dot(q, k.T) * (scale * _LOG2E)
        if scales:
            scores = scores * scales[0][page, head][None, :]
        place = index * page_tokens + jnp.arange(page_tokens)
        seen = (place < length)[None, :]
        if group:
            seen = place[None, :] < limit[:, None]
        scores = jnp.where(seen, scores, _MASKED)
        peak = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp2(scores - peak[:, None])
        decay = jnp.exp2(top - peak)
        total = total * decay + weights.sum(axis=-1)
        if scales:
            weights = weights * scales[1][page, head][None, :]
        v = v_pages[page, head].astype(q.dtype)
        acc = acc * decay[:, None] + plgpu.dot(weights.astype(q.dtype), v)
        return peak, total, acc

    start = (
        jnp.full((padded,), _MASKED, jnp.float32),
        jnp.zeros((padded,), jnp.float32),
        jnp.zeros((padded, head_dim), jnp.float32),
    )
    top, total, acc = jax.lax.fori_loop(first, last, body, start)
    acc_ref[...] = acc
    top_ref[...] = top
    total_ref[...] = total


def _join(acc: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """Join the splits, axis 0, by their running maxima (in log2) and sums."""
    share = jnp.exp2(top - top.max(axis=0))
    total = (total * share).sum(axis=0)
    return (acc * share[..., None]).sum(axis=0) / jnp.maximum(total, 1e-30)[..., None]

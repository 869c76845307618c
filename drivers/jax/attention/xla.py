"""Paged attention in plain XLA, for any device.

Pages are gathered block by block inside a loop whose trip count follows the longest row, with a running
softmax (Milakov and Gimelshein, 2018; Dao et al., 2022): one program serves every context length, short
contexts stay cheap, and on a CPU the gathered block stays in cache, which made it two to four times
faster than gathering whole contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax import platform
from llmos.drivers.jax.attention.backend import Paged
from llmos.drivers.jax.attention.caches import BITS, Cache, PagedCache, held, numbers, write
from llmos.drivers.jax.attention.plans import PLAIN, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig

_MASKED = -1e30

Running = tuple[jax.Array, jax.Array, jax.Array]
"""A softmax's maxima and sums [B, kv_heads, n], and the mixed values [B, kv_heads, n, head_dim].

n are the queries of one KV head: all C of its first query head, then all of its next.
"""


@dataclass(frozen=True)
class XlaAttention(Paged):
    """``tokens_in_flight`` bounds the tokens gathered at once over all rows of a batch."""

    tokens_in_flight: int = 2048
    name: str = "xla"
    knows_fresh: bool = False

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PagedCache]:
        shape = (pages, config.kv_heads, page_tokens, config.head_dim)
        parts = [(shape, dtype)] * 2 + [(shape[:-1], jnp.float32)] * (2 if quant.is_quantised(dtype) else 0)
        return [PagedCache(*(jnp.zeros(*part) for part in parts)) for _ in range(config.layers)]

    def scrub(self, cache: PagedCache, pages: jax.Array) -> PagedCache:
        own = self.own(cache, pages)

        def clear(part: jax.Array) -> jax.Array:
            found = numbers(part[own])
            cleared = jnp.where(jnp.isfinite(found), found, jnp.zeros_like(found))
            return part.at[own].set(held(cleared, part.dtype), mode="drop")

        cleared: PagedCache = jax.tree.map(clear, cache)
        return cleared

    def prefill(
        self,
        plan: PrefillPlan,
        cache: Cache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Cache]:
        return self.verify(VerifyPlan(*plan), cache, q, k, v, scoring)

    def write(self, cache: Cache, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        return write(cache, self.own(cache, pages), offsets, k, v)

    def own(self, cache: Cache, pages: jax.Array) -> jax.Array:
        """Where pages are in this device's cache; out of range for those that are not there."""
        return pages

    def attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Cache,
        q: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> jax.Array:
        _, total, acc = self.running(tables, lengths, visible, cache, q, scoring)
        return finish(total, acc, q)

    def running(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Cache,
        q: jax.Array,
        scoring: Scoring,
        columns: jax.Array | None = None,
    ) -> Running:
        """As ``attend``, before it is finished; blocks before every row's window are not read.

        Where a table [B, width] holds only some of a sequence's pages, ``columns`` [B, width] says which.
        """
        _, kv_heads, page_tokens, _ = cache.k.shape
        width = tables.shape[1]
        block = self._block_pages(len(q), width, page_tokens)
        tokens = block * page_tokens
        grouped = _grouped(q, kv_heads)
        limit = _limit(visible, q, kv_heads)
        grouped = grouped.astype(_computed(cache, q))

        def body(index: jax.Array, found: Running) -> Running:
            ids = jax.lax.dynamic_slice_in_dim(tables, index * block, block, axis=1)
            scores = _scored(grouped, cache, ids, scoring)
            if columns is None:
                place = index * tokens + jnp.arange(tokens)
            else:
                at = jax.lax.dynamic_slice_in_dim(columns, index * block, block, axis=1)
                place = _places(at, page_tokens)
            scores = jnp.where(_seen(place, limit, scoring.window), scores, _MASKED)
            return _extended(found, scores, cache, ids, grouped.dtype)

        shape = grouped.shape[:-1]
        start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32))
        window = scoring.window if columns is None else 0
        first, end = _blocks(lengths, visible, tokens, width // block, window)
        found: Running = jax.lax.fori_loop(first, end, body, start)
        return found

    def _block_pages(self, rows: int, width: int, page_tokens: int) -> int:
        """Pages gathered at once per row: a power of two that divides the (padded) table's width."""
        tokens = min(256, max(64, self.tokens_in_flight // rows))
        block = max(1, tokens // page_tokens)
        while width % block:
            block //= 2
        return block


def finish(total: jax.Array, acc: jax.Array, q: jax.Array) -> jax.Array:
    """The output, like q [B, C, heads, head_dim], of a running softmax's sums and mixed values."""
    rows, chunk, _, head_dim = q.shape
    out = (acc / total[..., None]).reshape(rows, acc.shape[1], -1, chunk, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _computed(cache: Cache, q: jax.Array) -> Any:
    """The type that is multiplied: a CPU without products of bfloat16 takes twice as long to imitate them."""
    imitated = cache.k.dtype == BITS and not platform.multiplies_bfloat16()
    return jnp.float32 if imitated else q.dtype


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """Queries [B, C, heads, head_dim] by the KV head that they read: [B, kv_heads, n, head_dim]."""
    rows, chunk, heads, head_dim = q.shape
    grouped = q.reshape(rows, chunk, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(rows, kv_heads, -1, head_dim)


def _limit(visible: jax.Array, q: jax.Array, kv_heads: int) -> jax.Array:
    """How many tokens each of the grouped queries sees, if it had no window: [B, 1, n, 1]."""
    _, chunk, heads, _ = q.shape
    return jnp.tile(visible[:, None] + jnp.arange(chunk), (1, heads // kv_heads))[:, None, :, None]


def _blocks(
    lengths: jax.Array, visible: jax.Array, tokens: int, most: int, window: int
) -> tuple[Any, jax.Array]:
    """The first block of so many ``tokens`` that some row reads, and the one after the last."""
    end = jnp.clip((jnp.max(lengths) + tokens - 1) // tokens, 1, most)
    if not window:
        return 0, end
    oldest = jnp.where(lengths > 0, visible - window, jnp.max(lengths))
    return jnp.clip(jnp.min(oldest) // tokens, 0, end - 1), end


def _scored(grouped: jax.Array, cache: Cache, ids: jax.Array, scoring: Scoring) -> jax.Array:
    """The scores [B, kv_heads, n, tokens] of the keys in pages ``ids`` [B, pages], seen or not."""
    scores = _scores(grouped, _gather(cache.k, ids + cache.first))
    scores = scores * (scoring.scale or grouped.shape[-1] ** -0.5)
    if cache.k_scale is not None:
        scores = scores * _gather(cache.k_scale, ids)[:, :, None]
    return jnp.tanh(scores / scoring.cap) * scoring.cap if scoring.cap else scores


def _places(columns: jax.Array, page_tokens: int) -> jax.Array:
    """Where in their sequences the tokens of pages in ``columns`` [B, pages] are: [B, 1, 1, tokens]."""
    place = columns[:, None, None, :, None] * page_tokens + jnp.arange(page_tokens)
    return place.reshape(len(columns), 1, 1, -1)


def _seen(place: jax.Array, limit: jax.Array, window: int) -> jax.Array:
    """Whether a query sees the token at a place."""
    seen = place < limit
    return seen & (place >= limit - window) if window else seen


def _extended(found: Running, scores: jax.Array, cache: Cache, ids: jax.Array, computed: Any) -> Running:
    """A running softmax with the tokens of the pages ``ids`` as well."""
    top, total, acc = found
    peak = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - peak[..., None])
    decay = jnp.exp(top - peak)
    sums, v = weights.sum(axis=-1), _gather(cache.v, ids + cache.second)
    if cache.v_scale is not None:
        weights = weights * _gather(cache.v_scale, ids)[:, :, None]
    if cache.v_scale is not None or cache.v.dtype == BITS:
        v = v.astype(computed)
    return peak, total * decay + sums, acc * decay[..., None] + _mix(weights, v)


def _gather(part: jax.Array, ids: jax.Array) -> jax.Array:
    """Pages ``ids`` [B, n] of a cache part [pages, ...] -> [B, kv_heads, n * page_tokens, ...]."""
    pages, kv_heads, *rest = part.shape
    flat = ids[:, None, :] * kv_heads + jnp.arange(kv_heads)[None, :, None]
    blocks = numbers(part.reshape(pages * kv_heads, *rest)[flat])
    return blocks.reshape(ids.shape[0], kv_heads, -1, *rest[1:])


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bhqd,bhtd->bhqt", q, k.astype(q.dtype), precision=_precision(q), preferred_element_type=jnp.float32
    )


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum(
        "bhqt,bhtd->bhqd",
        weights.astype(v.dtype),
        v,
        precision=_precision(v),
        preferred_element_type=jnp.float32,
    )

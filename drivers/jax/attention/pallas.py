"""Paged attention for NVIDIA GPUs: our own kernel in Pallas (Triton), and cuDNN for what needs no page.

A prompt's first chunk attends to itself alone, which cuDNN does best where it can: it has no soft cap. All
else, one token of each row, guesses and later chunks, goes through the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention import turning
from llmos.drivers.jax.attention.backend import Paged
from llmos.drivers.jax.attention.caches import Cache, PagedCache, PooledCache, packed, write
from llmos.drivers.jax.attention.cudnn import suits_cudnn
from llmos.drivers.jax.attention.paged import paged_attention, split_count, tiling
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.config import DecoderConfig

TALL = 64  # rows of a program from which twice the warps share its sums


@dataclass(frozen=True)
class PallasAttention(Paged):
    """``fresh`` is what computes a prompt's first chunk, which needs no page."""

    warps: int = 4
    stages: int = 2
    fresh: Literal["cudnn", "xla"] = "cudnn"
    interpret: bool = False
    name: str = "pallas+cudnn"
    knows_fresh: bool = True
    _xla: XlaAttention = field(default_factory=XlaAttention)

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PagedCache]:
        return self._xla.allocate(config, pages, page_tokens, dtype)

    def scrub(self, cache: PagedCache, pages: jax.Array) -> PagedCache:
        return self._xla.scrub(cache, pages)

    def step(
        self, plan: DecodePlan, cache: Cache, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Cache]:
        if not turning.suits(cache, new):
            return super().step(plan, cache, new, scoring)
        rows, width = plan.tables.shape
        return turning.turned_attention(
            plan,
            cache,
            new,
            scoring=scoring,
            splits=split_count(rows, new.kv_heads, width),
            warps=self.warps,
            stages=self.stages,
            interpret=self.interpret,
        )

    def prefill(
        self,
        plan: PrefillPlan,
        cache: Cache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Cache]:
        if not fresh:
            return self.verify(VerifyPlan(*plan), cache, q, k, v, scoring)
        cache = write_pages(cache, plan, k, v)
        if scoring.cap or not suits_cudnn(q.shape[-1]):
            return self.attend(plan.tables, plan.lengths, plan.starts + 1, cache, q, scoring), cache
        # The chunk attends to itself alone; what pads it comes after all that counts.
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scoring.scale or None,
            is_causal=True,
            local_window_size=(scoring.window - 1, 0) if 0 < scoring.window < q.shape[1] else None,
            implementation=self.fresh,
        )
        return out, cache

    def write(self, cache: Cache, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
        return write(cache, pages, offsets, k, v)

    def attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Cache,
        q: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> jax.Array:
        rows, queries, heads, head_dim = q.shape
        kv_heads = cache.k.shape[1]
        tile = tiling(queries, heads // kv_heads, head_dim, 1, scoring)
        return paged_attention(
            q,
            cache,
            tables,
            lengths,
            visible,
            scoring=scoring,
            splits=split_count(rows * -(-queries // tile.queries), kv_heads, tables.shape[1]),
            warps=self.warps * (2 if tile.rows >= TALL else 1),
            stages=self.stages,
            interpret=self.interpret,
        )


def write_pages(cache: Cache, plan: PrefillPlan, k: jax.Array, v: jax.Array) -> Any:
    """Put k and v [R, C, kv_heads, head_dim] of rows that start at position 0 into their pages, page by page.

    Token by token this costs ten times as much. What pads a row's last page is overwritten as it grows.
    """
    _, chunk, kv_heads = k.shape[:3]
    page_tokens, pages = cache.k.shape[2], -(-chunk // cache.k.shape[2])
    padding = ((0, 0), (0, pages * page_tokens - chunk), (0, 0))
    width = min(pages, plan.tables.shape[1])
    used = jnp.arange(width) * page_tokens < plan.lengths[:, None]
    ids = jnp.where(used, plan.tables[:, :width], cache.k.shape[0]).reshape(-1)

    def put(part: jax.Array, new: jax.Array, ids: jax.Array) -> jax.Array:
        rest = new.shape[3:]
        padded = jnp.pad(new, padding + ((0, 0),) * len(rest))
        blocks = padded.reshape(-1, pages, page_tokens, kv_heads, *rest)[:, :width]
        blocks = blocks.swapaxes(2, 3).reshape(-1, kv_heads, page_tokens, *rest)
        return part.at[ids].set(blocks, mode="drop", unique_indices=True)

    new = packed(cache, k, v)
    if isinstance(cache, PooledCache):
        return cache.written(put(cache.blocks, jnp.concatenate([new.k, new.v]), cache.both(ids)))
    return jax.tree.map(lambda part, new: put(part, new, ids), cache, new)

"""Paged attention for TPUs: the ragged kernel of jax's own library, for single tokens, guesses and chunks.

The kernel wants keys and values of a token beside each other, heads in pairs of key and value. It takes
sequences of unlike length one after the other; here all rows of a step have as many queries, what pads a row
counts as tokens that nobody looks at. No TPU was at hand: what is known of this backend is that it equals
XLA's in interpret mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

from llmos.drivers.jax.attention.backend import Turned
from llmos.drivers.jax.attention.plans import (
    PLAIN,
    DecodePlan,
    MixedPlan,
    PrefillPlan,
    Scoring,
    VerifyPlan,
    joined,
)
from llmos.drivers.jax.decoder.config import DecoderConfig


class PairedCache(NamedTuple):
    """Keys (even) and values (odd) of one layer [pages, page_tokens, 2 * kv_heads, head_dim]."""

    kv: jax.Array


@dataclass(frozen=True)
class TpuAttention(Turned):
    """``blocks`` are pages and queries taken at a time; without, those that are tuned for the device."""

    blocks: tuple[int, int] | None = None
    name: str = "tpu"
    knows_fresh: bool = False

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PairedCache]:
        shape = (pages, page_tokens, 2 * config.kv_heads, config.head_dim)
        return [PairedCache(jnp.zeros(shape, dtype)) for _ in range(config.layers)]

    def scrub(self, cache: PairedCache, pages: jax.Array) -> PairedCache:
        found = cache.kv[pages]
        clear = jnp.where(jnp.isfinite(found), found, jnp.zeros_like(found))
        return PairedCache(cache.kv.at[pages].set(clear, mode="drop"))

    def decode(
        self,
        plan: DecodePlan,
        cache: PairedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PairedCache]:
        cache = write(cache, plan.pages, plan.offsets, k, v)
        # The kernel would wait for ever for the pages of a row that has none.
        lengths = jnp.maximum(plan.lengths, 1)
        return self._attend(plan.tables, lengths, cache, q[:, None], scoring)[:, 0], cache

    def verify(
        self,
        plan: VerifyPlan,
        cache: PairedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PairedCache]:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        cache = write(cache, plan.pages.reshape(-1), plan.offsets.reshape(-1), *flat)
        before = jnp.where(plan.lengths > 0, plan.starts, 0)
        return self._attend(plan.tables, before + q.shape[1], cache, q, scoring), cache

    def prefill(
        self,
        plan: PrefillPlan,
        cache: PairedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PairedCache]:
        return self.verify(VerifyPlan(*plan), cache, q, k, v, scoring)

    def mixed(
        self,
        plan: MixedPlan,
        cache: PairedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PairedCache]:
        (q, more_q), (k, more_k), (v, more_v) = (plan.part(x) for x in (q, k, v))
        own, cache = self.decode(plan.rows, cache, q, k, v, scoring)
        others, cache = self.verify(plan.pieces, cache, more_q, more_k, more_v, scoring)
        return joined(own, others), cache

    def _attend(
        self, tables: jax.Array, lengths: jax.Array, cache: PairedCache, q: jax.Array, scoring: Scoring
    ) -> jax.Array:
        """The last C queries of each row, q [B, C, heads, head_dim], over its ``lengths`` [B] tokens."""
        rows, queries, heads, head_dim = q.shape
        pages, block = self.blocks or (None, None)
        out: jax.Array = library.ragged_paged_attention(
            q.reshape(-1, heads, head_dim),
            cache.kv,
            lengths.astype(jnp.int32),
            tables.astype(jnp.int32),
            jnp.arange(rows + 1, dtype=jnp.int32) * queries,
            jnp.full((1,), rows, jnp.int32),
            sm_scale=scoring.scale or head_dim**-0.5,
            sliding_window=scoring.window or None,
            soft_cap=scoring.cap or None,
            num_kv_pages_per_block=pages,
            num_queries_per_block=block,
        )
        return out.reshape(q.shape)


def write(
    cache: PairedCache, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array
) -> PairedCache:
    """Put k and v [n, kv_heads, head_dim] at (page, offset) [n]; pages out of range are dropped."""
    pairs = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2]).astype(cache.kv.dtype)
    return PairedCache(cache.kv.at[pages, offsets].set(pairs, mode="drop", unique_indices=True))


def wants(config: DecoderConfig, dtype: str, kv_dtype: str) -> str:
    """What the library's kernel would need of a model and does not find, in words."""
    packing = 2 if kv_dtype == "bfloat16" else 1
    heads = 2 * config.kv_heads
    if kv_dtype not in ("bfloat16", "float32") or kv_dtype != dtype:
        return f"pages in the model's own bfloat16 or float32, asked for is {kv_dtype}"
    if config.head_dim % 128:
        return f"head_dim a multiple of 128, here {config.head_dim}"
    if heads % packing or (heads // packing not in (1, 2, 4, 8) and heads // packing % 8):
        return f"KV heads that fill its tiles (1, 2, 4 or a multiple of 8), here {config.kv_heads}"
    return ""

"""Attention over KV pages that are spread over the sequence axis of a mesh (context parallelism).

Page p is on device p % n, so that a sequence's pages, which mostly follow each other, are spread evenly.
Each device attends over the pages it has, and the partial results are joined by their running maxima and
sums, as the parts of one device's pages are (Dao et al., 2022; Liu et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention.caches import Cache, PagedCache
from llmos.drivers.jax.attention.plans import PLAIN, Scoring
from llmos.drivers.jax.attention.xla import XlaAttention, finish
from llmos.drivers.jax.decoder.config import DecoderConfig

AXIS = "sequence"
_NOWHERE = 1 << 24
"""A column after every token."""


@dataclass(frozen=True)
class SequenceAttention(XlaAttention):
    """As ``XlaAttention``, with a share of the pages on each of ``parts`` devices."""

    name: str = "xla+sequence"
    parts: int = 1

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PagedCache]:
        return super().allocate(config, -(-pages // self.parts) * self.parts, page_tokens, dtype)

    def own(self, cache: Cache, pages: jax.Array) -> jax.Array:
        size = cache.k.shape[0]
        return jnp.where(pages % self.parts == jax.lax.axis_index(AXIS), pages // self.parts, size)

    def attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Cache,
        q: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> jax.Array:
        """Attend over this device's pages, and join what the devices found."""
        page_tokens = cache.k.shape[2]
        every = jnp.arange(tables.shape[1])
        used = every * page_tokens < lengths[:, None]
        held = used & (tables % self.parts == jax.lax.axis_index(AXIS))
        # The columns that this device has, in order; the same in all layers, which the compiler sees.
        columns = jnp.argsort(jnp.where(held, every, _NOWHERE), axis=1)
        mine = jnp.take_along_axis(tables, columns, axis=1) // self.parts
        counts = held.sum(axis=1, dtype=jnp.int32)
        columns = jnp.where(every < counts[:, None], columns, _NOWHERE)
        top, total, acc = self.running(mine, counts * page_tokens, visible, cache, q, scoring, columns)
        share = jnp.exp(top - jax.lax.pmax(top, AXIS))  # type: ignore[no-untyped-call]
        total, acc = jax.lax.psum((total * share, acc * share[..., None]), AXIS)  # type: ignore[no-untyped-call]
        return finish(total, acc, q)

"""Attention over KV pages that are spread over the sequence axis of a mesh (context parallelism).

Page p is on device p % n, so that a sequence's pages, which mostly follow each other, are spread evenly.
Each device attends over the pages it has, and the partial results are joined by their running maxima and
sums, as the parts of one device's pages are (Dao et al., 2022; Liu et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.xla import PagedCache, XlaAttention, finish, write
from llmos.drivers.jax.config import DecoderConfig

AXIS = "sequence"
_NOWHERE = 1 << 24
"""A column after every token."""


@dataclass(frozen=True)
class SequenceAttention:
    """Wraps XLA attention; ``parts`` devices have a share of the pages each."""

    parts: int
    name: str = "xla+sequence"
    knows_fresh: bool = False
    xla: XlaAttention = field(default_factory=XlaAttention)

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[PagedCache]:
        return self.xla.allocate(config, -(-pages // self.parts) * self.parts, page_tokens, dtype)

    def scrub(self, cache: PagedCache, pages: jax.Array) -> PagedCache:
        return self.xla.scrub(cache, self._own(cache, pages))

    def decode(
        self,
        plan: DecodePlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        cache = write(cache, self._own(cache, plan.pages), plan.offsets, k, v)
        out = self._attend(plan, plan.lengths[:, None], cache, q[:, None], scoring)
        return out[:, 0], cache

    def prefill(
        self,
        plan: PrefillPlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        cache = write(cache, self._own(cache, plan.pages).reshape(-1), plan.offsets.reshape(-1), k, v)
        visible = plan.starts[:, None] + jnp.arange(1, q.shape[1] + 1)
        return self._attend(plan, visible, cache, q, scoring), cache

    def verify(
        self,
        plan: VerifyPlan,
        cache: PagedCache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, PagedCache]:
        return self.prefill(PrefillPlan(*plan), cache, q, k, v, scoring=scoring)

    def _attend(
        self,
        plan: DecodePlan | PrefillPlan,
        visible: jax.Array,
        cache: PagedCache,
        q: jax.Array,
        scoring: Scoring,
    ) -> jax.Array:
        """Attend over this device's pages, and join what the devices found."""
        page_tokens = cache.k.shape[2]
        every = jnp.arange(plan.tables.shape[1])
        used = every * page_tokens < plan.lengths[:, None]
        held = used & (plan.tables % self.parts == jax.lax.axis_index(AXIS))
        # The columns that this device has, in order; the same in all layers, which the compiler sees.
        columns = jnp.argsort(jnp.where(held, every, _NOWHERE), axis=1)
        tables = jnp.take_along_axis(plan.tables, columns, axis=1) // self.parts
        counts = held.sum(axis=1, dtype=jnp.int32)
        columns = jnp.where(every < counts[:, None], columns, _NOWHERE)
        lengths = counts * page_tokens
        top, total, acc = self.xla.running(tables, visible, lengths, cache, q, scoring, columns)
        share = jnp.exp(top - jax.lax.pmax(top, AXIS))  # type: ignore[no-untyped-call]
        total, acc = jax.lax.psum((total * share, acc * share[..., None]), AXIS)  # type: ignore[no-untyped-call]
        return finish(total, acc, q)

    def _own(self, cache: PagedCache, pages: jax.Array) -> jax.Array:
        """Where pages are on this device; out of range for those that are elsewhere, or nowhere."""
        size = cache.k.shape[0]
        return jnp.where(pages % self.parts == jax.lax.axis_index(AXIS), pages // self.parts, size)

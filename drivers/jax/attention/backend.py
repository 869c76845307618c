"""The interface of attention backends, and what several of them share.

A backend owns the layout of its cache. It writes the keys and values of new tokens to their pages and
attends over everything that a sequence has, so that each key and value byte is touched once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import jax

from llmos.drivers.jax.attention.plans import (
    PLAIN,
    DecodePlan,
    MixedPlan,
    PrefillPlan,
    Scoring,
    VerifyPlan,
    joined,
)
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.config import DecoderConfig


class AttentionBackend(Protocol):
    """What a backend does; all methods but ``allocate`` are traced."""

    @property
    def knows_fresh(self) -> bool:
        """Whether ``prefill`` is faster when it is told that all rows are fresh."""
        ...

    @property
    def name(self) -> str:
        """How the backend is reported."""
        ...

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[Any]:
        """One zeroed cache per layer with ``pages`` pages; the last page is never written."""
        ...

    def scrub(self, cache: Any, pages: jax.Array) -> Any:
        """Zero whatever is not finite in the pages with these ids [n]; ids out of range are ignored."""
        ...

    def decode(
        self, plan: DecodePlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B, heads, head_dim], k and v [B, kv_heads, head_dim] -> output like q, and the cache."""
        ...

    def step(
        self, plan: DecodePlan, cache: Any, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """As ``decode``, of tokens [B] whose queries and keys are yet to be turned."""
        ...

    def prefill(
        self,
        plan: PrefillPlan,
        cache: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """q [R, C, heads, head_dim], k and v [R, C, kv_heads, head_dim] -> output like q, and the cache.

        ``fresh`` (static): all rows start at position 0, so that nothing is read from the cache.
        """
        ...

    def verify(
        self, plan: VerifyPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B, C, heads, head_dim], k and v [B, C, kv_heads, head_dim] -> output like q, and the cache.

        Each token sees those before it; a row's pages are read once for all its tokens.
        """
        ...

    def extend(
        self,
        plan: PrefillPlan | VerifyPlan,
        cache: Any,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """As ``prefill`` or ``verify``, of tokens whose queries and keys are yet to be turned."""
        ...

    def mixed(
        self, plan: MixedPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B + R * C, heads, head_dim], k and v likewise -> output like q, and the cache.

        What ``decode`` and ``verify`` would do one after the other; pieces of a prompt see those before them.
        """
        ...


class Turned:
    """What backends share whose kernels take queries and keys that are turned."""

    def step(
        self: AttentionBackend, plan: DecodePlan, cache: Any, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        return self.decode(plan, cache, *new.parts(), scoring)

    def extend(
        self: AttentionBackend,
        plan: PrefillPlan | VerifyPlan,
        cache: Any,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        if isinstance(plan, VerifyPlan):
            return self.verify(plan, cache, *new.parts(), scoring)
        return self.prefill(plan, cache, *new.parts(), fresh, scoring)


class Paged(Turned, ABC):
    """What backends share that write the new keys and values first and then attend over pages.

    All are written before any is read: XLA would copy the cache for a write between two reads.
    """

    @abstractmethod
    def write(self, cache: Any, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        """The cache with k and v [n, kv_heads, head_dim] at ``pages`` and ``offsets`` [n]."""

    @abstractmethod
    def attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Any,
        q: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> jax.Array:
        """Attend from q [B, C, heads, head_dim] over the first ``lengths`` [B] tokens of pages ``tables``.

        Of a row the first query sees the first ``visible`` [B] tokens, each later one a token more, and of
        these the last ``scoring.window``.
        """

    def decode(
        self, plan: DecodePlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        cache = self.write(cache, plan.pages, plan.offsets, k, v)
        return self._decode(plan, cache, q, scoring), cache

    def verify(
        self, plan: VerifyPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        cache = self.write(cache, plan.pages.reshape(-1), plan.offsets.reshape(-1), *flat)
        return self._verify(plan, cache, q, scoring), cache

    def mixed(
        self, plan: MixedPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        cache = self.write(cache, plan.pages, plan.offsets, k, v)
        own, others = plan.part(q)
        first = self._decode(plan.rows, cache, own, scoring)
        return joined(first, self._verify(plan.pieces, cache, others, scoring)), cache

    def _decode(self, plan: DecodePlan, cache: Any, q: jax.Array, scoring: Scoring) -> jax.Array:
        return self.attend(plan.tables, plan.lengths, plan.lengths, cache, q[:, None], scoring)[:, 0]

    def _verify(self, plan: VerifyPlan, cache: Any, q: jax.Array, scoring: Scoring) -> jax.Array:
        return self.attend(plan.tables, plan.lengths, plan.starts + 1, cache, q, scoring)

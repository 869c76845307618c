"""Caches of several models in one array: a pool of slabs, each cut into the pages of whichever model has it.

A page of a model is a run of blocks, a layer's keys and then its values for one layer after the other. Block
sizes divide the slab, so the pool seen as blocks of one model is the same memory: no program copies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.caches import BITS, PooledCache, held, numbers
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, MixedPlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.config import DecoderConfig


@dataclass(frozen=True)
class Geometry:
    """How one model's pages lie in slabs of ``slab`` numbers; what is left at a slab's end is not used.

    ``block`` is the shape of a layer's keys, or values, in one page: [kv_heads, page_tokens, head_dim].
    """

    layers: int
    block: tuple[int, int, int]
    slab: int

    @property
    def page(self) -> int:
        """Numbers in a page over all layers."""
        return 2 * self.layers * prod(self.block)

    @property
    def slab_pages(self) -> int:
        return self.slab // self.page

    def blocks(self, pages: jax.Array) -> jax.Array:
        """The first block of each page; page p is number p mod slab_pages in slab p / slab_pages."""
        slab, place = jnp.divmod(pages, self.slab_pages)
        return slab * (self.slab // prod(self.block)) + place * 2 * self.layers


def storage(dtype: Any, on_cpu: bool) -> Any:
    """What a cache for numbers of this type is an array of; see ``BITS``."""
    return BITS if on_cpu and dtype == jnp.bfloat16 else jnp.dtype(dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["pool"], meta_fields=["geometry"])
@dataclass(frozen=True)
class SharedCaches:
    """What a program takes as a model's caches: ``pool`` [slabs, slab] as this model sees it."""

    pool: jax.Array
    geometry: Geometry

    def layer(self, number: int) -> PooledCache:
        """The cache of one layer."""
        return PooledCache(self.pool, np.int32(2 * number), self.geometry.block)  # type: ignore[arg-type]

    def with_layer(self, cache: PooledCache) -> SharedCaches:
        """These caches as ``cache`` leaves them, which is all that follows may read."""
        return SharedCaches(cache.pool, self.geometry)

    def pages(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pool as blocks [blocks, size], and which [n, 2 layers] of them are the pages ``rows`` [n]."""
        blocks = self.pool.reshape(-1, prod(self.geometry.block))
        return blocks, self.geometry.blocks(rows)[:, None] + jnp.arange(2 * self.geometry.layers)

    def with_pages(self, blocks: jax.Array) -> SharedCaches:
        """These caches with the blocks of ``pages`` changed."""
        return SharedCaches(blocks.reshape(self.pool.shape), self.geometry)

    def scrubbed(self, rows: jax.Array) -> SharedCaches:
        """These caches with zeros for all that is not finite in the pages ``rows`` [n]."""
        blocks, own = self.pages(rows)
        found = numbers(blocks[own])
        cleared = held(jnp.where(jnp.isfinite(found), found, 0), blocks.dtype)
        return self.with_pages(blocks.at[own].set(cleared, mode="drop"))


@dataclass(frozen=True)
class SharedAttention:
    """Another backend over ``SharedCaches``: it is told blocks for pages."""

    inner: AttentionBackend
    geometry: Geometry

    @property
    def knows_fresh(self) -> bool:
        return self.inner.knows_fresh

    @property
    def name(self) -> str:
        return self.inner.name

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> Any:
        """A zeroed pool that holds ``pages`` pages, which are whole slabs."""
        return SharedCaches(
            jnp.zeros((pages // self.geometry.slab_pages, self.geometry.slab), dtype), self.geometry
        )

    def scrub(self, cache: Any, pages: jax.Array) -> Any:
        return cache.scrubbed(pages)

    def step(
        self, plan: DecodePlan, cache: Any, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        return self.inner.step(self._placed(plan), cache, new, scoring)

    def decode(
        self, plan: DecodePlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        return self.inner.decode(self._placed(plan), cache, q, k, v, scoring)

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
        return self.inner.prefill(self._placed(plan), cache, q, k, v, fresh, scoring)

    def verify(
        self, plan: VerifyPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        return self.inner.verify(self._placed(plan), cache, q, k, v, scoring)

    def extend(
        self,
        plan: PrefillPlan | VerifyPlan,
        cache: Any,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        return self.inner.extend(self._placed(plan), cache, new, fresh, scoring)

    def mixed(
        self, plan: MixedPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        placed = MixedPlan(self._placed(plan.rows), self._placed(plan.pieces))
        return self.inner.mixed(placed, cache, q, k, v, scoring)

    def _placed(self, plan: Any) -> Any:
        # The same in every layer, so that the compiler does it once.
        blocks = self.geometry.blocks
        return plan._replace(tables=blocks(plan.tables), pages=blocks(plan.pages))


def layer(caches: Any, number: int) -> Any:
    """The cache of one layer, whichever way a model's caches are held."""
    return caches.layer(number) if isinstance(caches, SharedCaches) else caches[number]


def with_layer(caches: Any, number: int, cache: Any) -> Any:
    """The caches with that of one layer replaced."""
    if isinstance(caches, SharedCaches):
        return caches.with_layer(cache)
    return [*caches[:number], cache, *caches[number + 1 :]]

"""Paged attention on a CPU by the native kernels, which read pages where they lie.

XLA gathers them first, which at short contexts costs a decoding step more than attending, and walks over all
of a block's scores several times.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention.caches import Cache, PagedCache, PooledCache
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.rope import Turn
from llmos.drivers.jax.native import build

HEAD_MULTIPLE = 16
"""The kernels have no path for what is left of a head over whole vectors."""


@dataclass(frozen=True)
class NativeAttention(XlaAttention):
    """As ``XlaAttention``, with a kernel for one new token per row and one for several."""

    name: str = "native"

    def decode(
        self,
        plan: DecodePlan,
        cache: Cache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Cache]:
        new = (q, k.astype(q.dtype), v.astype(q.dtype))
        numbers = (plan.tables, plan.lengths, plan.pages, plan.offsets)
        return _call("attention", q.shape, new, cache, numbers, scoring)

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

    def verify(
        self,
        plan: VerifyPlan,
        cache: Cache,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Cache]:
        nothing = jnp.zeros((*q.shape[:2], 0), jnp.float32)
        new = Projected.of(q, k, v, Turn(nothing, nothing))
        return self.extend(plan, cache, new, scoring=scoring)

    def extend(
        self,
        plan: PrefillPlan | VerifyPlan,
        cache: Cache,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Cache]:
        rows, tokens, _, head_dim = new.fused.shape
        shape, kv_heads = (rows, tokens, new.heads, head_dim), np.int32(new.kv_heads)
        numbers = (plan.tables, plan.starts, plan.lengths, plan.pages, plan.offsets)
        given = (new.normed(), *new.turn)
        return _call("prompts", shape, given, cache, numbers, scoring, kv_heads=kv_heads)


def _call(
    kernel: str,
    shape: tuple[int, ...],
    new: tuple[jax.Array, ...],
    cache: Cache,
    numbers: tuple[jax.Array, ...],
    scoring: Scoring,
    **others: np.int32,
) -> tuple[jax.Array, Cache]:
    """What a kernel makes of ``new``, of the queries' ``shape``; and the cache, written in place."""
    paired = isinstance(cache, PooledCache)
    # A pool as it is: a reshaped one would be copied before it is aliased.
    given = [cache.pool, cache.first] if isinstance(cache, PooledCache) else [cache.k, cache.v]
    written, at = given[:1] if paired else given, len(new)
    shapes = [jax.ShapeDtypeStruct(shape, new[0].dtype)]  # type: ignore[no-untyped-call]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written]  # type: ignore[no-untyped-call]
    aliases = {at + i: 1 + i for i in range(len(written))}
    call = jax.ffi.ffi_call(build.target(kernel), shapes, input_output_aliases=aliases)
    out, *written = call(
        *new,
        *given,
        *(x.astype(jnp.int32) for x in numbers),
        scale=np.float32(scoring.scale or shape[-1] ** -0.5),
        cap=np.float32(scoring.cap),
        page_tokens=np.int32(cache.k.shape[2]),
        window=np.int32(scoring.window),
        **others,
    )
    return out, cache.written(written[0]) if isinstance(cache, PooledCache) else PagedCache(*written)

"""Paged attention on a CPU: decoding by the native kernel, prompts by XLA, over the same cache.

The kernel reads pages where they lie; XLA gathers them first, which at short contexts costs more than
attending.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention import PLAIN, DecodePlan, Scoring
from llmos.drivers.jax.attention.xla import Cache, PagedCache, PooledCache, XlaAttention
from llmos.drivers.jax.native import build

HEAD_MULTIPLE = 16
"""The kernel has no path for what is left of a head over whole vectors."""


@dataclass(frozen=True)
class NativeAttention(XlaAttention):
    """As ``XlaAttention``, with the kernel for one new token per row."""

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
        paired = isinstance(cache, PooledCache)
        # A pool as it is: a reshaped one would be copied before it is aliased.
        given = [cache.pool, cache.first] if isinstance(cache, PooledCache) else [cache.k, cache.v]
        written = given[:1] if paired else given
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *written)]  # type: ignore[no-untyped-call]
        aliases = {3: 1} if paired else {3: 1, 4: 2}
        call = jax.ffi.ffi_call(build.target("attention"), shapes, input_output_aliases=aliases)
        numbers = (plan.tables, plan.lengths, plan.pages, plan.offsets)
        out, *written = call(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            *given,
            *(x.astype(jnp.int32) for x in numbers),
            scale=np.float32(scoring.scale or q.shape[-1] ** -0.5),
            cap=np.float32(scoring.cap),
            page_tokens=np.int32(cache.k.shape[2]),
            window=np.int32(scoring.window),
        )
        return out, cache.written(written[0]) if isinstance(cache, PooledCache) else PagedCache(*written)

"""Loading a model into a pool: what is refused, how large the first one makes the pool, and joining it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llmos.drivers.jax import platform
from llmos.drivers.jax.attention.shared import Geometry, storage
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.paging import pool
from llmos.drivers.jax.paging.pool import Pool, Pools, Share, Sizes
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument, NoMemory

HOST_CACHE_BYTES = 512 << 20
"""What a CPU's pages may take where nobody says."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Member:
    """A model that has joined a pool, but does not use it yet."""

    pool: Pool
    geometry: Geometry

    @property
    def pages(self) -> int:
        return self.pool.sizes.slabs * self.geometry.slab_pages

    def caches(self) -> Share:
        """Its caches; the pool is allocated if it is the first."""
        self.pool.fill()
        return Share(self.pool, self.geometry)

    def described(self) -> dict[str, Any]:
        """Fields of ``LoadedModel``."""
        slabs, slab = self.pool.sizes.slabs, self.pool.sizes.slab
        size = slab * self.pool.dtype.itemsize
        return {
            "pool": self.pool.name,
            "slabs": slabs,
            "slab_pages": self.geometry.slab_pages,
            "slab_bytes": size,
        }


def check_request(request: LoadRequest) -> None:
    """Refuse with InvalidArgument what cannot have pages in a pool."""
    if not 0 <= request.arena_bytes <= 1 << 50:
        raise InvalidArgument(f"arena_bytes is {request.arena_bytes}, not in 0..{1 << 50}")
    if request.arena == "own":
        return
    reasons = {
        f"has pages in {request.kv_dtype} with scales": request.kv_dtype not in DTYPES,
        "is cut over several devices": any(n > 1 for axis, n in request.mesh.items() if axis != "data"),
        "has a draft model": request.speculation in ("auto", "draft") and request.draft != "",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InvalidArgument(f'a model that {reason} cannot share pages with others: arena = "own"')


def join(pools: Pools, request: LoadRequest, config: DecoderConfig, device: Any, weights: int) -> Member:
    """Make a model of ``weights`` bytes a member of the pool on ``device``, which the first one sizes.

    InvalidArgument if its pages do not fit into slabs; NoMemory if the pool or its weights do not fit.
    """
    dtype = storage(DTYPES[request.kv_dtype], device.platform == "cpu")
    block = config.kv_heads, request.page_tokens, config.head_dim
    sizes = pools.find(request.kv_dtype) or _first(request, config, device, weights, dtype.itemsize)
    geometry = Geometry(config.layers, block, sizes.slab)
    pool.check(geometry)
    joined = pools.join(Pool(request.kv_dtype, device, dtype, sizes), request.model)
    free = platform.free_memory(device)
    wanted = weights + (sizes.bytes(dtype.itemsize) if joined.array is None else 0)
    if free and wanted > free:
        raise NoMemory(
            f"{wanted} bytes for weights and shared pages do not fit in {free}: unload models, or let the "
            "first one leave room by a smaller arena_bytes"
        )
    return Member(joined, geometry)


def _first(request: LoadRequest, config: DecoderConfig, device: Any, weights: int, itemsize: int) -> Sizes:
    block = config.kv_heads * request.page_tokens * config.head_dim
    page = 2 * config.layers * block
    context = min(request.max_context, config.max_positions)
    needed = -(-context // request.page_tokens) * page * itemsize
    on_cpu = device.platform == "cpu"
    budget = int(platform.free_memory(device) * request.memory_fraction) - weights
    if on_cpu:
        budget = min(budget, max(HOST_CACHE_BYTES, 2 * needed))
    if request.arena_bytes:
        budget = request.arena_bytes
    elif request.pages:
        slab = pool.plan(request.pages * page * itemsize, page, block, itemsize, on_cpu).slab
        return Sizes(-(-request.pages // max(1, slab // page)), slab)
    return pool.plan(budget, page, block, itemsize, on_cpu)

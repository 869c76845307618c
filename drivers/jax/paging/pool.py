"""The memory that several models of a driver share: one array per device and type of KV, cut into slabs.

Whoever hands out pages gives a slab to a model, which finds its own pages in it; here nobody keeps count. All
models' programs take the array and give it back, in the order of their dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention.shared import Geometry, SharedCaches
from llmos.ipc.errors import InvalidArgument

# A slab is this many numbers, times a power of two: block sizes of nearly all models divide one of these.
ODD = 3 * 5 * 7
SLAB_BYTES = (ODD << 20, ODD << 17)  # elsewhere, and on a CPU
_LEAST_SLABS = 32  # of a pool, if its slabs can be smaller
_LEAST_PAGES = 8  # of a slab, if its slabs can be larger
_LARGEST = 1 << 8  # how much larger


@dataclass(frozen=True)
class Sizes:
    """``slabs`` can be handed out, each of ``slab`` numbers; one more is there, which stays zero."""

    slabs: int
    slab: int

    def bytes(self, itemsize: int) -> int:
        """What the pool takes."""
        return (self.slabs + 1) * self.slab * itemsize


def plan(budget: int, page: int, block: int, itemsize: int, on_cpu: bool) -> Sizes:
    """Sizes of a pool in ``budget`` bytes whose first model has so many numbers in a page and in a block.

    It may be that no slab can be cut into these blocks: ``check`` finds that.
    """

    def suits(slab: int) -> bool:
        return slab % block == 0 and slab >= _LEAST_PAGES * page

    slab = SLAB_BYTES[on_cpu] // itemsize
    largest = slab * _LARGEST
    while suits(slab // 2) and budget < _LEAST_SLABS * slab * itemsize:
        slab //= 2
    while not suits(slab) and slab < largest:
        slab *= 2
    return Sizes(max(0, budget // (slab * itemsize) - 1), slab)


def check(geometry: Geometry) -> None:
    """Refuse with InvalidArgument a model whose pages are not to be cut from these slabs."""
    heads, tokens, size = geometry.block
    if geometry.slab % prod(geometry.block):
        fits = [n for n in (1 << i for i in range(10, -1, -1)) if geometry.slab % (heads * n * size) == 0]
        advice = f"page_tokens = {fits[0]} would do" if fits else "it needs pages of its own"
        raise InvalidArgument(
            f"a slab of {geometry.slab} numbers cannot be cut into blocks of {heads} KV heads x {tokens} "
            f'tokens x {size}: {advice}, or arena = "own"'
        )
    if not geometry.slab_pages:
        raise InvalidArgument(
            f"a page of {geometry.page} numbers is larger than a slab of {geometry.slab}: lower page_tokens, "
            'load this model first, or arena = "own"'
        )


@dataclass
class Pool:
    """One device's array of ``dtype``, named after what it holds; it is there once ``fill`` was called.

    ``users`` are the models that share it.

    ``cleaners`` clear what each model knows to be broken, before another can be given those pages.
    """

    name: str
    device: Any
    dtype: Any
    sizes: Sizes
    users: set[str] = field(default_factory=set)
    cleaners: list[Callable[[], None]] = field(default_factory=list)
    array: jax.Array | None = None

    def fill(self) -> None:
        """Allocate it, zeroed, unless that was done."""
        if self.array is None:
            sharding = jax.sharding.SingleDeviceSharding(self.device)
            shape = self.sizes.slabs + 1, self.sizes.slab
            self.array = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=sharding)()


@dataclass
class Own:
    """One model's caches, where these are its own."""

    caches: list[Any]
    cleaners: list[Callable[[], None]] = field(default_factory=list)


class Share:
    """One model's caches, where these are in a pool; a program that has taken them must give them back."""

    def __init__(self, pool: Pool, geometry: Geometry) -> None:
        self._pool = pool
        self._geometry = geometry
        pool.fill()

    @property
    def cleaners(self) -> list[Callable[[], None]]:
        return self._pool.cleaners

    @property
    def caches(self) -> SharedCaches:
        assert self._pool.array is not None
        return SharedCaches(self._pool.array, self._geometry)

    @caches.setter
    def caches(self, caches: SharedCaches) -> None:
        self._pool.array = caches.pool


class Pools:
    """The pools of a driver, which are alike on all its devices that have one, by type of KV."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, int], Pool] = {}

    def find(self, name: str) -> Sizes | None:
        """The sizes of the pools of a type of KV, if there are any."""
        return next((pool.sizes for (each, _), pool in self._pools.items() if each == name), None)

    def join(self, pool: Pool, model: str) -> Pool:
        """The pool of that name and device, which is this one if there is none yet, with one user more."""
        pool = self._pools.setdefault((pool.name, pool.device.id), pool)
        pool.users.add(model)
        return pool

    def keep(self, models: Container[str]) -> None:
        """Forget all models but these, and free the pools that none of them uses."""
        for key, pool in list(self._pools.items()):
            pool.users = {user for user in pool.users if user in models}
            if not pool.users:
                del self._pools[key]
                if pool.array is not None and not pool.array.is_deleted():
                    pool.array.delete()

"""All arenas there are, by name, and the pools that some of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmos.ipc.errors import InvalidArgument, LLMOSError, NotFound
from llmos.services.memory import messages
from llmos.services.memory.arena import MAX_PAGES, Arena
from llmos.services.memory.messages import PoolUsage
from llmos.services.memory.restoring import restore
from llmos.services.memory.slabs import SlabPool


class Arenas:
    """A pool is there as long as an arena is in it; its first one says how large it is."""

    def __init__(self) -> None:
        self._arenas: dict[str, Arena] = {}
        self._pools: dict[str, SlabPool] = {}

    def __getitem__(self, name: str) -> Arena:
        found = self._arenas.get(name)
        if found is None:
            raise NotFound(f"there is no arena {name!r}: declare it first")
        return found

    def __iter__(self) -> Iterator[Arena]:
        return iter(self._arenas.values())

    def declare(self, spec: messages.Arena) -> Arena:
        """A new arena, empty; an earlier one of that name is forgotten, unless this one makes no sense."""
        return self._enter(spec, lambda slabs: Arena(spec, slabs))

    def restore(self, message: messages.Restore) -> Arena:
        """As ``declare``, with all that is held in it."""
        return self._enter(message.arena, lambda slabs: restore(message, slabs))

    def drop(self, name: str) -> None:
        """Forget an arena."""
        pool = self[name].spec.pool
        del self._arenas[name]
        if pool:
            self._pools[pool].leave(name)
            if not self._pools[pool].members:
                del self._pools[pool]

    def pools(self) -> list[PoolUsage]:
        """The pools by name, and how much of them is free."""
        return [
            PoolUsage(
                pool=pool.name,
                slabs=len(pool.holders),
                free=pool.free,
                slab_bytes=pool.slab_bytes,
                share=pool.share,
                arenas=list(pool.members),
            )
            for _, pool in sorted(self._pools.items())
        ]

    def _enter(self, spec: messages.Arena, make: Callable[[SlabPool | None], Arena]) -> Arena:
        if not spec.pool:
            arena = make(None)
            if spec.arena in self._arenas:
                self.drop(spec.arena)
        else:
            arena = self._enter_pool(spec, make)
        self._arenas[spec.arena] = arena
        return arena

    def _enter_pool(self, spec: messages.Arena, make: Callable[[SlabPool | None], Arena]) -> Arena:
        _check_slabs(spec)
        pool = self._pool(spec)
        holders, members = list(pool.holders), dict(pool.members)
        pool.leave(spec.arena)
        try:
            arena = make(pool)
        except LLMOSError:
            pool.holders, pool.members = holders, members
            raise
        earlier = self._arenas.get(spec.arena)
        if earlier is not None and earlier.spec.pool != spec.pool:
            self.drop(spec.arena)
        self._pools[spec.pool] = pool
        return arena

    def _pool(self, spec: messages.Arena) -> SlabPool:
        pool = self._pools.get(spec.pool) or SlabPool(spec.pool, spec.slabs, spec.slab_bytes)
        if list(pool.members) == [spec.arena]:
            pool = SlabPool(spec.pool, spec.slabs, spec.slab_bytes)
        if (len(pool.holders), pool.slab_bytes) != (spec.slabs, spec.slab_bytes):
            raise InvalidArgument(
                f"pool {spec.pool!r} has {len(pool.holders)} slabs of {pool.slab_bytes} bytes, not"
                f" {spec.slabs} of {spec.slab_bytes}: drop its arenas first"
            )
        return pool


def _check_slabs(spec: messages.Arena) -> None:
    if not (0 < spec.slabs <= MAX_PAGES and 0 < spec.slab_pages <= MAX_PAGES):
        raise InvalidArgument(f"arena {spec.arena!r}: a pool has slabs, and pages in each")
    if spec.pages != spec.slabs * spec.slab_pages:
        raise InvalidArgument(
            f"arena {spec.arena!r}: {spec.slabs} slabs of {spec.slab_pages} pages are not {spec.pages} pages"
        )
    if spec.slab_pages * spec.page_bytes > spec.slab_bytes:
        raise InvalidArgument(
            f"arena {spec.arena!r}: {spec.slab_pages} pages of {spec.page_bytes} bytes do not fit in"
            f" {spec.slab_bytes}"
        )

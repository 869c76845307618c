"""The pages of one arena: which are free, and how many tasks hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.services.memory.radix import RadixIndex

FREE = b"\x01"


class PagePool:
    """Page numbers 0 to ``total`` - 1, handed out in contiguous runs where there are any.

    Runs matter because a page is moved between devices together with its neighbours. A page is *free*, or
    taken and *held* by as many tasks as ``holders`` says; one that is taken and held by nobody is cached.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.holders = [0] * total
        self._map = bytearray(FREE * total)
        self._lowest = 0  # no page below this one is free

    def pages(self) -> Iterable[int]:
        """The pages that there are."""
        return range(self.total)

    def is_free(self, page: int) -> bool:
        return self._map[page] == 1

    @property
    def at_hand(self) -> int:
        """Pages to be had without dropping any."""
        return self.free

    def elsewhere(self, borrow: bool = True) -> int:
        """Pages that could be had from other arenas; unless it may ``borrow``, within this one's share."""
        return 0

    @property
    def claimable(self) -> int:
        """Pages that others have to give back where they are needed."""
        return 0

    def obtain(self, missing: int, index: RadixIndex, borrow: bool = True) -> int:
        """Get pages from elsewhere, where that is better than to evict from this ``index``, or the only way;
        how many of the missing ones were got."""
        return 0

    def debts(self) -> tuple[int, dict[str, int]]:
        """How many slabs of this arena's share are not to be had; who uses more than theirs, and how many
        more."""
        return 0, {}

    def take(self, count: int) -> list[int]:
        """``count`` free pages, held by nobody yet, in as few runs as first fit by halves finds.

        The caller has made sure that so many are free.
        """
        taken, self._lowest = self._runs(count, self._lowest, len(self._map))
        self.free -= count
        return taken

    def claim(self, page: int) -> None:
        """Take one given page, which must be free."""
        self._map[page] = 0
        self.free -= 1

    def give_back(self, page: int) -> None:
        """Make a page that nobody holds free."""
        self._map[page] = 1
        self._lowest = min(self._lowest, page)
        self.free += 1

    def _runs(self, count: int, start: int, stop: int) -> tuple[list[int], int]:
        """Take so many of the free pages from ``start`` to ``stop``; none is free below the page returned."""
        taken: list[int] = []
        run = count
        while len(taken) < count:
            run = min(run, count - len(taken))
            at = self._map.find(FREE * run, start, stop)
            if at < 0:
                run //= 2
                continue
            self._map[at : at + run] = bytes(run)
            if run == 1 or at == start:
                start = at + run
            taken.extend(range(at, at + run))
        return taken, start

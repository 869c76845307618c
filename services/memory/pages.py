"""The pages of one arena: which are free, and how many tasks hold each of the others."""

from __future__ import annotations

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

    def is_free(self, page: int) -> bool:
        return self._map[page] == 1

    def take(self, count: int) -> list[int]:
        """``count`` free pages, held by nobody yet, in as few runs as first fit by halves finds.

        The caller has made sure that so many are free.
        """
        taken: list[int] = []
        run = count
        while len(taken) < count:
            run = min(run, count - len(taken))
            start = self._map.find(FREE * run, self._lowest)
            if start < 0:
                run //= 2
                continue
            self._map[start : start + run] = bytes(run)
            if run == 1 or start == self._lowest:
                self._lowest = start + run
            taken.extend(range(start, start + run))
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

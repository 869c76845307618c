"""Slabs: one device's KV memory in equal parts, each of which is one arena's or nobody's. Pure.

Models that share a device have arenas of one ``SlabPool`` and not a part each. Whoever lacks pages takes a
slab that is free, or empties one in which nobody owns a page: one without any page first, else the one whose
cached pages are worth least. An emptied slab stays where it is until somebody needs it: to take it costs
nothing then. What is owned is never taken here; every arena has a claim to its *share* of the slabs, and who
uses more has borrowed them (``debts``): the scheduler gets them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from llmos.ipc.errors import InvalidArgument
from llmos.services.memory.pages import FREE, PagePool
from llmos.services.memory.radix import DEVICE, TURNOVER, Clock, Node, RadixIndex

MARGIN = 2.0  # so many times colder than its own has to be what an arena takes from another


class SlabPool:
    """Who holds which slab. ``clock`` runs in slabs' worth of pages that came into any of the arenas."""

    def __init__(self, name: str, slabs: int, slab_bytes: int) -> None:
        self.name = name
        self.slab_bytes = slab_bytes
        self.holders: list[SlabPages | None] = [None] * slabs
        self.members: dict[str, SlabPages] = {}
        self.clock = Clock()

    def join(self, name: str, pages: SlabPages) -> None:
        """Let an arena take part; it holds nothing yet."""
        if len(self.members) >= len(self.holders):
            raise InvalidArgument(
                f"pool {self.name!r} has {len(self.holders)} slabs, too few for one more arena: give it more"
                " memory, or share it among fewer models"
            )
        self.members[name] = pages

    def leave(self, name: str) -> None:
        """An arena is gone: its slabs are free."""
        gone = self.members.pop(name, None)
        self.holders = [None if holder is gone else holder for holder in self.holders]

    @property
    def free(self) -> int:
        """Slabs that nobody holds."""
        return self.holders.count(None)

    @property
    def share(self) -> int:
        """Slabs that each arena can have whenever it needs them."""
        return len(self.holders) // max(1, len(self.members))

    def cheapest(self, needy: SlabPages) -> tuple[float, int]:
        """(what it costs, slab) for the best slab that is not ``needy``'s; infinite where all are in use."""
        best, found = inf, -1
        for slab, holder in enumerate(self.holders):
            if holder is needy:
                continue
            cost = 0.0 if holder is None else holder.cost(slab)
            if cost < best:
                best, found = cost, slab
            if not best:
                break
        return best, found

    def others(self, needy: SlabPages) -> tuple[int, int]:
        """Slabs that ``needy`` could have from others: those without any page, and all."""
        costs = [0.0 if h is None else h.cost(slab) for slab, h in enumerate(self.holders) if h is not needy]
        return costs.count(0.0), len(costs) - costs.count(inf)

    def worth(self, priority: float) -> float:
        """How likely a cached page is needed again, by its eviction priority: half for each eighth of the
        memory that was filled since (after LRFU, Lee et al., 2001)."""
        return float(2.0 ** ((priority - self.clock.now) * TURNOVER / len(self.holders)))


class SlabPages(PagePool):
    """The pages of one arena in a pool: page ``slab * slab_pages + j`` for each slab it holds.

    ``total`` and ``free`` count those of the slabs it holds. Pages are handed out where most are in use
    already, so that other slabs become empty.
    """

    def __init__(self, slabs: SlabPool, slab_pages: int, drop: Callable[[Node], None]) -> None:
        count = len(slabs.holders)
        super().__init__(count * slab_pages)
        self.total = self.free = 0
        self._map = bytearray(count * slab_pages)
        self.slabs = slabs
        self.slab_pages = slab_pages
        self._drop = drop
        self._spare = [0] * count
        self._loose: list[dict[int, Node]] = [{} for _ in range(count)]  # unpinned nodes, by page
        self._recency = [0.0] * count  # the sum of their priorities
        self._priority: Callable[[Node], float] = lambda node: node.last_use
        self._filling = 0

    def index(self, page_tokens: int) -> RadixIndex:
        """An index over these pages that goes by the pool's clock."""
        found = RadixIndex(
            len(self.slabs.holders), page_tokens, self.slabs.clock, 1.0 / self.slab_pages, self._loosened
        )
        self._priority = lambda node: found.priority(node)[0]
        return found

    # --- what an arena does with pages ---

    def pages(self) -> Iterable[int]:
        return [slab * self.slab_pages + page for slab in self.held for page in range(self.slab_pages)]

    @property
    def at_hand(self) -> int:
        return self.free + self.slab_pages * self.slabs.others(self)[0]

    def elsewhere(self, borrow: bool = True) -> int:
        return self.slab_pages * min(self.slabs.others(self)[1], self._most(borrow))

    @property
    def claimable(self) -> int:
        return self.slab_pages * self._most(borrow=False)

    def obtain(self, missing: int, index: RadixIndex, borrow: bool = True) -> int:
        before, most = missing, self._most(borrow)
        while missing > 0 and most > 0:
            cost, slab = self.slabs.cheapest(self)
            if slab < 0 or (missing <= index.evictable and MARGIN * cost >= self._coldest(index)):
                break
            self._acquire(slab)
            missing, most = missing - self.slab_pages, most - 1
        return min(before, before - missing)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            slab = self._filling
            if not self._spare[slab] or self.slabs.holders[slab] is not self:
                slab = self._filling = max(self.held, key=self._fitness)
            taken += self._take(slab, min(count - len(taken), self._spare[slab]))
        return taken

    def claim(self, page: int) -> None:
        slab = page // self.slab_pages
        if self.slabs.holders[slab] is None:
            self._acquire(slab)
        if self.slabs.holders[slab] is not self:
            raise InvalidArgument(f"page {page} is in a slab that another arena of the pool holds")
        self._spare[slab] -= 1
        super().claim(page)

    def give_back(self, page: int) -> None:
        self._spare[page // self.slab_pages] += 1
        super().give_back(page)

    def debts(self) -> tuple[int, dict[str, int]]:
        share = self.slabs.share
        others = {name: each.used - share for name, each in self.slabs.members.items() if each is not self}
        owed = max(0, share - self.used - self.slabs.others(self)[1])
        return owed, {name: more for name, more in others.items() if more > 0}

    # --- what the pool asks ---

    @property
    def held(self) -> list[int]:
        """The slabs of this arena."""
        return [slab for slab, holder in enumerate(self.slabs.holders) if holder is self]

    @property
    def used(self) -> int:
        """Slabs in which a page is owned."""
        return sum(self.in_use(slab) > 0 for slab in self.held)

    def cost(self, slab: int) -> float:
        """What is lost with a slab of this arena: the mean worth of its pages, of which a free one has none;
        infinite where one is owned."""
        if self.in_use(slab):
            return inf
        count = len(self._loose[slab])
        return count / self.slab_pages * self.slabs.worth(self._recency[slab] / count) if count else 0.0

    def release(self, slab: int) -> None:
        """Drop what is cached in a slab of this arena, in which nothing is owned, and give the slab up."""
        loose = self._loose[slab]
        while loose:
            self._drop(next(iter(loose.values())))
        start = slab * self.slab_pages
        self._map[start : start + self.slab_pages] = bytes(self.slab_pages)
        self._spare[slab] = 0
        self.free -= self.slab_pages
        self.total -= self.slab_pages
        self.slabs.holders[slab] = None

    # --- what they are made of ---

    def in_use(self, slab: int) -> int:
        """Pages of a slab that are owned, or cached and not to be dropped; 0 where it is not this arena's."""
        if self.slabs.holders[slab] is not self:
            return 0
        return self.slab_pages - self._spare[slab] - len(self._loose[slab])

    def _most(self, borrow: bool) -> int:
        """How many slabs more it may hold."""
        return len(self.slabs.holders) if borrow else max(0, self.slabs.share - len(self.held))

    def _fitness(self, slab: int) -> tuple[bool, int, int]:
        spare = self._spare[slab]
        return spare > 0, self.in_use(slab), -spare

    def _coldest(self, index: RadixIndex) -> float:
        return max((self.slabs.worth(self._priority(node)) for node in index.coldest(DEVICE, 1)), default=0.0)

    def _acquire(self, slab: int) -> None:
        holder = self.slabs.holders[slab]
        if holder is not None:
            holder.release(slab)
        start = slab * self.slab_pages
        self._map[start : start + self.slab_pages] = FREE * self.slab_pages
        self._spare[slab] = self.slab_pages
        self.free += self.slab_pages
        self.total += self.slab_pages
        self.slabs.holders[slab] = self

    def _take(self, slab: int, count: int) -> list[int]:
        start = slab * self.slab_pages
        taken, _ = self._runs(count, start, start + self.slab_pages)
        self._spare[slab] -= count
        self.free -= count
        return taken

    def _loosened(self, node: Node, change: int) -> None:
        slab = node.page // self.slab_pages
        loose = self._loose[slab]
        if change > 0:
            loose[node.page] = node
            self._recency[slab] += self._priority(node)
        else:
            del loose[node.page]
            self._recency[slab] = self._recency[slab] - self._priority(node) if loose else 0.0

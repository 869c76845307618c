"""Random operations on an arena with host and disk tiers, against a model that knows what each page holds.

A walk by weights and not a hypothesis machine: states in which all tiers are full are many steps away.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from llmos.ipc.errors import Busy, NoMemory
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena
from llmos.services.memory.invariants import check
from llmos.services.memory.messages import Costs, Holding, Restore
from llmos.services.memory.restoring import restore
from llmos.services.memory.transfers import TIERS, Transfer

SIZE = 2
TENANTS = ("red", "blue")
WEIGHTS = {
    "reserve": 6,
    "commit": 8,
    "grow": 2,
    "free": 4,
    "swap_out": 4,
    "swap_in": 4,
    "demote": 4,
    "settle": 8,
    "restart": 0.05,
}
Content = tuple[str, tuple[int, ...]]
Place = tuple[int, int]


@dataclass
class ModelTask:
    tenant: str
    tokens: list[int]
    pages: list[int]
    computed: int
    away: bool = False
    moving: bool = False


@dataclass
class Copying:
    """A transfer under way, and what its sources held when it began."""

    transfer: Transfer
    task: int
    sources: dict[Place, Content | None] = field(default_factory=dict)


class Walk:
    """``content`` is what the device and the tiers would hold: the tenant and all tokens up to there."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        spec = messages.Arena(
            arena="a",
            pages=self.random.randint(4, 40),
            page_tokens=SIZE,
            page_bytes=1,
            host_pages=self.random.choice((0, 5, 20)),
            disk_pages=self.random.choice((0, 4, 12)),
        )
        self.arena = Arena(spec)
        if self.random.random() < 0.3:
            self.arena.tiers.learn(Costs(arena="a", token=10.0, host=8.0, disk=30.0, transfer=15.0))
        self.tasks: dict[int, ModelTask] = {}
        self.copying: dict[int, Copying] = {}
        self.content: dict[Place, Content] = {}
        self.next_id = 1

    def step(self) -> None:
        """One operation that is possible now, and every invariant."""
        (name,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        getattr(self, name)()
        self.holds()

    def reserve(self) -> None:
        id, self.next_id = self.next_id, self.next_id + 1
        tenant = self.random.choice(TENANTS)
        # Few different beginnings, so that prefixes are shared.
        tokens = [self.random.choice((0, 0, 0, 1)) for _ in range(self.random.randint(1, 16))]
        extra, quota = self.random.randint(0, 4), self.random.choice((0, 0, 0, 12))
        try:
            pages, cached = self.arena.reserve(id, tenant, tokens, extra, quota, borrow=self.borrows())
        except NoMemory:
            return
        assert cached % SIZE == 0
        assert cached < len(tokens)
        self.tasks[id] = ModelTask(tenant, list(tokens), pages, cached)
        self.entered(id, extra)

    def commit(self) -> None:
        if (id := self.any(away=False)) is None:
            return
        task = self.tasks[id]
        new = [self.random.randint(0, 1) for _ in range(self.random.randint(0, 3))]
        limit = min(len(task.tokens) + len(new), len(task.pages) * SIZE)
        computed = self.random.choice((limit, self.random.randint(task.computed, limit)))
        # The device writes before memory is told.
        task.tokens += new
        for index in range(task.computed // SIZE, -(-computed // SIZE)):
            end = min(computed, (index + 1) * SIZE)
            if end > task.computed:
                self.content[0, task.pages[index]] = task.tenant, tuple(task.tokens[:end])
        task.computed = computed
        self.arena.commit([(id, new, computed)])

    def grow(self) -> None:
        if (id := self.any(away=False)) is not None:
            ((_, pages),) = self.arena.grow([(id, self.random.randint(0, 3))], borrow=self.borrows())
            self.tasks[id].pages += pages

    def free(self) -> None:
        if self.tasks:
            id = self.random.choice(list(self.tasks))
            self.arena.free([id])
            del self.tasks[id]

    def swap_out(self) -> None:
        if (id := self.any(away=False)) is None:
            return
        before = self.arena.usage()
        try:
            transfer = self.arena.tiers.swap_out(id)
        except NoMemory:
            assert self.arena.usage() == before
            return
        self.tasks[id].away, self.tasks[id].pages = True, []
        self.begin(transfer, id)

    def swap_in(self) -> None:
        if (id := self.any(away=True)) is None:
            return
        before = self.arena.usage()
        extra = self.random.randint(0, 4)
        try:
            pages, cached = self.arena.tiers.swap_in(
                id, extra, self.random.choice((0, 0, 2)), borrow=self.borrows()
            )
        except (NoMemory, Busy):
            # The first attempt may have found that blocks were lost.
            assert self.arena.usage().owned == before.owned
            assert self.arena.usage().free == before.free
            return
        task = self.tasks[id]
        assert cached <= task.computed
        task.away, task.pages, task.computed = False, pages, cached
        self.entered(id, extra)

    def demote(self) -> None:
        transfer = self.arena.tiers.demote()
        if transfer is not None:
            self.begin(transfer, 0)

    def settle(self) -> None:
        if not self.copying:
            return
        copying = self.copying.pop(self.random.choice(list(self.copying)))
        batches = copying.transfer.batches
        done = self.random.choice([len(batches)] * 4 + [0, len(batches) // 2])
        for items in batches[:done]:
            for item in items:
                held = copying.sources[item.source]
                assert self.content.get(item.source) == held, "a page on its way was written"
                self.content.pop(item.target, None)
                if held is not None:
                    self.content[item.target] = held
        ended = self.arena.tiers.settle(copying.transfer.id, done)
        task = self.tasks.get(copying.task)
        if task is None:
            assert ended is None
            return
        if ended is None:
            assert done < len(batches)
            assert not task.away
            del self.tasks[copying.task]
            return
        assert ended.computed <= task.computed
        assert done < len(batches) or ended.computed == task.computed
        task.computed, task.moving = ended.computed, False
        self.holds_its_own(task)

    def restart(self) -> None:
        """Memory is started anew: what is away or on its way is given up by the scheduler."""
        self.copying.clear()
        self.tasks = {id: t for id, t in self.tasks.items() if not t.away and not t.moving}
        held = [
            Holding(i, t.tenant, list(t.pages), list(t.tokens), t.computed) for i, t in self.tasks.items()
        ]
        self.arena = restore(Restore(arena=self.arena.spec, tasks=held))

    def holds(self) -> None:
        check(self.arena)
        assert [tier.tier for tier in self.arena.usage().tiers] == [
            name for name, pool in zip(TIERS[1:], self.arena.tiers.pools[1:], strict=True) if pool.total
        ]
        for id, task in self.tasks.items():
            assert self.arena.tasks[id].pages == task.pages
            if not task.moving and not task.away:
                self.holds_its_own(task)

    def entered(self, id: int, extra: int) -> None:
        """A task was given pages; what it holds has to be there once it is settled."""
        task = self.tasks[id]
        assert len(task.pages) == -(-(len(task.tokens) + extra) // SIZE) == len(set(task.pages))
        transfer = self.arena.tasks[id].transfer
        if transfer is not None:
            self.begin(transfer, id)
        else:
            self.holds_its_own(task)

    def begin(self, transfer: Transfer, task: int) -> None:
        copying = self.copying[transfer.id] = Copying(transfer, task)
        for items in transfer.batches:
            for item in items:
                copying.sources[item.source] = self.content.get(item.source)
        if task:
            self.tasks[task].moving = True

    def holds_its_own(self, task: ModelTask) -> None:
        for start in range(0, task.computed if not task.away else 0, SIZE):
            end = min(task.computed, start + SIZE)
            tenant, tokens = self.content[0, task.pages[start // SIZE]]
            assert (tenant, tokens[:end]) == (task.tenant, tuple(task.tokens[:end])), "not its KV"

    def borrows(self) -> bool:
        """Whether a request for pages may take slabs of others."""
        return True

    def any(self, *, away: bool) -> int | None:
        found = [id for id, t in self.tasks.items() if t.away == away and not t.moving]
        return self.random.choice(found) if found else None


@pytest.mark.parametrize("seed", range(16))
def test_every_page_is_accounted_for_and_holds_what_it_should(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(250):
        walk.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_hundred_thousand_operations(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(1000):
        walk.step()

"""Random operations on an arena with host and disk tiers, against a model that knows what each page holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmos.ipc.errors import Busy, NoMemory
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena, restore
from llmos.services.memory.invariants import check
from llmos.services.memory.messages import Costs, Holding, Restore
from llmos.services.memory.transfers import TIERS, Transfer

SIZE = 2
TENANTS = ("red", "blue")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)
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


class TiersMachine(RuleBasedStateMachine):
    """``content`` is what the device and the tiers would hold: the tenant and all tokens up to there."""

    @initialize(pages=st.integers(4, 24), host=st.integers(0, 16), disk=st.integers(0, 8), costs=st.booleans())
    def declare(self, pages: int, host: int, disk: int, costs: bool) -> None:
        spec = messages.Arena(
            arena="a", pages=pages, page_tokens=SIZE, page_bytes=1, host_pages=host, disk_pages=disk
        )
        self.arena = Arena(spec)
        if costs:
            self.arena.tiers.learn(Costs(arena="a", token=10.0, host=8.0, disk=30.0, transfer=15.0))
        self.tasks: dict[int, ModelTask] = {}
        self.copying: dict[int, Copying] = {}
        self.content: dict[Place, Content] = {}
        self.next_id = 1

    @rule(tenant=st.sampled_from(TENANTS), tokens=TOKENS, extra=st.integers(0, 4), quota=st.integers(0, 20))
    def reserve(self, tenant: str, tokens: list[int], extra: int, quota: int) -> None:
        id, self.next_id = self.next_id, self.next_id + 1
        try:
            pages, cached = self.arena.reserve(id, tenant, tokens, extra, quota)
        except NoMemory:
            return
        assert cached % SIZE == 0
        assert cached < len(tokens)
        self.tasks[id] = ModelTask(tenant, list(tokens), pages, cached)
        self.entered(id, extra)

    @precondition(lambda self: self.any(away=False))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.any(away=False)))
        task = self.tasks[id]
        new = data.draw(st.lists(st.integers(0, 1), max_size=3))
        limit = min(len(task.tokens) + len(new), len(task.pages) * SIZE)
        computed = data.draw(st.integers(task.computed, limit))
        # The device writes before memory is told.
        task.tokens += new
        for index in range(task.computed // SIZE, -(-computed // SIZE)):
            end = min(computed, (index + 1) * SIZE)
            if end > task.computed:
                self.content[0, task.pages[index]] = task.tenant, tuple(task.tokens[:end])
        task.computed = computed
        self.arena.commit([(id, new, computed)])

    @precondition(lambda self: self.any(away=False))
    @rule(data=st.data(), count=st.integers(0, 3))
    def grow(self, data: st.DataObject, count: int) -> None:
        id = data.draw(st.sampled_from(self.any(away=False)))
        ((_, pages),) = self.arena.grow([(id, count)])
        self.tasks[id].pages += pages

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.tasks)))
        self.arena.free([id])
        del self.tasks[id]

    @precondition(lambda self: self.any(away=False))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.any(away=False)))
        before = self.arena.usage()
        try:
            transfer = self.arena.tiers.swap_out(id)
        except NoMemory:
            assert self.arena.usage() == before
            return
        self.tasks[id].away, self.tasks[id].pages = True, []
        self.begin(transfer, id)

    @precondition(lambda self: self.any(away=True))
    @rule(data=st.data(), extra=st.integers(0, 4), spare=st.integers(0, 2))
    def swap_in(self, data: st.DataObject, extra: int, spare: int) -> None:
        id = data.draw(st.sampled_from(self.any(away=True)))
        before = self.arena.usage()
        try:
            pages, cached = self.arena.tiers.swap_in(id, extra, spare)
        except (NoMemory, Busy):
            assert self.arena.usage() == before
            return
        task = self.tasks[id]
        assert cached == task.computed
        task.away, task.pages = False, pages
        self.entered(id, extra)

    @rule()
    def demote(self) -> None:
        transfer = self.arena.tiers.demote()
        if transfer is not None:
            self.begin(transfer, 0)

    @precondition(lambda self: self.copying)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        copying = self.copying.pop(data.draw(st.sampled_from(sorted(self.copying))))
        batches = copying.transfer.batches
        done = data.draw(st.sampled_from([len(batches), len(batches), 0, len(batches) // 2]))
        for items in batches[:done]:
            for item in items:
                held = copying.sources[item.source]
                assert self.content.get(item.source) == held, "a page on its way was written"
                self.content.pop(item.target, None)
                if held is not None:
                    self.content[item.target] = held
        ended = self.arena.tiers.settle(copying.transfer.id, done)
        task = self.tasks.get(copying.task)
        if task is not None:
            assert ended is self.arena.tasks[copying.task]
            assert ended.computed <= task.computed
            assert done < len(batches) or ended.computed == task.computed
            task.computed, task.moving = ended.computed, False
            self.holds_its_own(task)
        else:
            assert ended is None

    @rule()
    def restart(self) -> None:
        """Memory is started anew: what is away or on its way is given up by the scheduler."""
        self.copying.clear()
        self.tasks = {id: t for id, t in self.tasks.items() if not t.away and not t.moving}
        held = [Holding(i, t.tenant, list(t.pages), list(t.tokens), t.computed) for i, t in self.tasks.items()]
        self.arena = restore(Restore(arena=self.arena.spec, tasks=held))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "arena"):
            return
        check(self.arena)
        usage = self.arena.usage()
        assert [tier.tier for tier in usage.tiers] == [
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

    def any(self, *, away: bool) -> list[int]:
        return sorted(id for id, t in self.tasks.items() if t.away == away and not t.moving)


TiersMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTiers = TiersMachine.TestCase


@pytest.mark.slow
class TestTiersAtLength(TiersMachine.TestCase):  # type: ignore[misc, name-defined]
    """100,000 operations."""

    settings = settings(
        max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
    )

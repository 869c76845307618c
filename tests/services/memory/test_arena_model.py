"""Random operations on an arena, against a naive model that knows what KV each page would hold."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmos.ipc.errors import NoMemory
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena
from llmos.services.memory.invariants import check
from llmos.services.memory.messages import Holding, Restore
from llmos.services.memory.restoring import restore

SIZE = 2
TENANTS = ("red", "blue")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)
Prefix = tuple[str, tuple[int, ...]]


class ModelTask:
    def __init__(self, tenant: str, quota: int, tokens: list[int], pages: list[int], computed: int) -> None:
        self.tenant = tenant
        self.quota = quota
        self.tokens = tokens
        self.pages = pages
        self.computed = computed


class ArenaMachine(RuleBasedStateMachine):
    """``content`` is what a device would have in each full page; ``shareable`` what was ever committed."""

    @initialize(pages=st.integers(6, 40))
    def declare(self, pages: int) -> None:
        self.arena = Arena(messages.Arena(arena="a", pages=pages, page_tokens=SIZE, page_bytes=1))
        self.pages = pages
        self.tasks: dict[int, ModelTask] = {}
        self.content: dict[int, Prefix] = {}
        self.shareable: set[Prefix] = set()
        self.next_id = 1

    @rule(tenant=st.sampled_from(TENANTS), tokens=TOKENS, extra=st.integers(0, 5), quota=st.integers(0, 20))
    def reserve(self, tenant: str, tokens: list[int], extra: int, quota: int) -> None:
        id, self.next_id = self.next_id, self.next_id + 1
        self.evictions_before = self.arena.evictions
        try:
            pages, cached = self.arena.reserve(id, tenant, tokens, extra, quota)
        except NoMemory as error:
            self.explain(error, tenant, quota)
            return
        assert cached % SIZE == 0
        assert 0 <= cached < len(tokens)
        assert len(pages) == -(-(len(tokens) + extra) // SIZE) == len(set(pages))
        for index, page in enumerate(pages):
            if index < cached // SIZE:
                assert self.content[page] == (tenant, tuple(tokens[: (index + 1) * SIZE]))
            else:
                assert all(page not in task.pages for task in self.tasks.values())
                self.content.pop(page, None)
        if self.arena.evictions == 0:
            assert cached == self.longest(tenant, tokens)
        self.tasks[id] = ModelTask(tenant, quota, list(tokens), pages, cached)
        assert not quota or self.owned(tenant) <= quota

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.tasks)), unique=True, min_size=1))
        batch = []
        for id in ids:
            task = self.tasks[id]
            new = data.draw(st.lists(st.integers(0, 1), max_size=3))
            limit = min(len(task.tokens) + len(new), len(task.pages) * SIZE)
            batch.append((id, new, data.draw(st.integers(task.computed, limit))))
        self.arena.commit(batch)
        for id, new, computed in batch:
            task = self.tasks[id]
            task.tokens += new
            for index in range(task.computed // SIZE, computed // SIZE):
                prefix = task.tenant, tuple(task.tokens[: (index + 1) * SIZE])
                self.content[task.pages[index]] = prefix
                self.shareable.add(prefix)
            task.computed = computed

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.tasks)), unique=True, min_size=1))
        wants = [(id, data.draw(st.integers(0, 3))) for id in ids]
        for (id, count), (got, pages) in zip(wants, self.arena.grow(wants), strict=True):
            assert id == got
            assert len(pages) in (0, count)
            assert all(page not in task.pages for task in self.tasks.values() for page in pages)
            for page in pages:
                self.content.pop(page, None)
            self.tasks[id].pages += pages

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.tasks)), unique=True, min_size=1))
        self.arena.free(ids)
        for id in ids:
            del self.tasks[id]

    @rule()
    def restart(self) -> None:
        held = [
            Holding(id, t.tenant, list(t.pages), list(t.tokens), t.computed) for id, t in self.tasks.items()
        ]
        self.arena = restore(Restore(arena=self.arena.spec, tasks=held))
        self.shareable = {
            (task.tenant, tuple(task.tokens[:end]))
            for task in self.tasks.values()
            for end in range(SIZE, task.computed + 1, SIZE)
        }
        for task in self.tasks.values():
            task.quota = 0

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "arena"):
            return
        check(self.arena)
        usage = self.arena.usage()
        assert usage.total == self.pages
        assert {line.tenant: line.owned for line in usage.tenants if line.owned} == {
            tenant: count for tenant in TENANTS if (count := self.owned(tenant))
        }
        for id, task in self.tasks.items():
            assert self.arena.tasks[id].pages == task.pages
            for index in range(task.computed // SIZE):
                prefix = task.tenant, tuple(task.tokens[: (index + 1) * SIZE])
                assert self.content[task.pages[index]] == prefix, "a page was handed to another"

    def explain(self, error: NoMemory, tenant: str, quota: int) -> None:
        """A refusal must be for want of pages, or of quota."""
        figures = {key: int(str(value)) for key, value in error.details.items()}
        if "quota" in figures:
            assert self.owned(tenant) + figures["needed"] > quota
        else:
            assert figures["needed"] > figures["free"] + figures["evictable"]
            assert self.arena.usage().evictions == self.evictions_before

    def owned(self, tenant: str) -> int:
        return len({page for task in self.tasks.values() if task.tenant == tenant for page in task.pages})

    def longest(self, tenant: str, tokens: list[int]) -> int:
        ends = range(SIZE, len(tokens), SIZE)
        return max((end for end in ends if (tenant, tuple(tokens[:end])) in self.shareable), default=0)


ArenaMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestArena = ArenaMachine.TestCase


@pytest.mark.slow
class TestArenaAtLength(ArenaMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(
        max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
    )

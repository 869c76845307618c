"""Random operations on several arenas of one pool, with host and disk tiers, against a model that knows what
each page holds. A slab that changes hands loses what was in it: who used it still would miss it."""

from __future__ import annotations

import random

import pytest

from llmos.services.memory import messages
from llmos.services.memory.arenas import Arenas
from llmos.services.memory.invariants import check_all
from llmos.services.memory.messages import Costs, Holding, Restore
from tests.services.memory.test_tiers_model import SIZE, Copying, ModelTask, Walk
from tests.services.memory.test_tiers_model import WEIGHTS as OPERATIONS

WEIGHTS = {name: weight for name, weight in OPERATIONS.items() if name != "restart"}


class Member(Walk):
    """The operations on one arena of a pool."""

    def __init__(self, rng: random.Random, arenas: Arenas, name: str, slabs: int) -> None:
        self.random = rng
        slab_pages = rng.randint(2, 9)
        self.spec = messages.Arena(
            arena=name,
            pages=slabs * slab_pages,
            page_tokens=SIZE,
            page_bytes=10 // slab_pages,
            host_pages=rng.choice((0, 5, 20)),
            disk_pages=rng.choice((0, 4, 12)),
            pool="p",
            slabs=slabs,
            slab_pages=slab_pages,
            slab_bytes=10,
        )
        self.tasks: dict[int, ModelTask] = {}
        self.copying: dict[int, Copying] = {}
        self.content = {}
        self.next_id = 1
        self.enter(arenas)

    def enter(self, arenas: Arenas) -> None:
        """The arena is new; nothing is in it."""
        self.arena = arenas.declare(self.spec)
        self.tasks.clear()
        self.copying.clear()
        if self.random.random() < 0.3:
            self.arena.tiers.learn(Costs(arena="a", token=10.0, host=8.0, disk=30.0, transfer=15.0))

    def restored(self, arenas: Arenas) -> None:
        """Memory was started anew."""
        self.copying.clear()
        self.tasks = {id: t for id, t in self.tasks.items() if not t.away and not t.moving}
        held = [
            Holding(i, t.tenant, list(t.pages), list(t.tokens), t.computed) for i, t in self.tasks.items()
        ]
        self.arena = arenas.restore(Restore(arena=self.spec, tasks=held))

    def borrows(self) -> bool:
        return self.random.random() < 0.6

    def lost(self, mine: set[int]) -> None:
        """What is in slabs that are not its own is overwritten by others."""
        gone = [
            place for place in self.content if place[0] == 0 and place[1] // self.spec.slab_pages not in mine
        ]
        for place in gone:
            del self.content[place]


class PoolWalk:
    """Arenas that come and go, and what is done to them in turn."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.arenas = Arenas()
        slabs = self.random.randint(4, 12)
        self.members = [
            Member(self.random, self.arenas, name, slabs) for name in "abcd"[: self.random.randint(2, 4)]
        ]
        self.here = set(self.members)

    def step(self) -> None:
        """One operation that is possible now, and every invariant."""
        if self.random.random() < 0.003:
            self.come_or_go(self.random.choice(self.members))
        if self.random.random() < 0.002:
            self.restart()
        member = self.random.choice(self.members)
        if member in self.here:
            (name,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            getattr(member, name)()
        self.holds()

    def come_or_go(self, member: Member) -> None:
        if member in self.here:
            self.arenas.drop(member.spec.arena)
            self.here.remove(member)
        else:
            member.enter(self.arenas)
            self.here.add(member)

    def restart(self) -> None:
        self.arenas = Arenas()
        for member in self.members:
            if member in self.here:
                member.restored(self.arenas)

    def holds(self) -> None:
        check_all(self.arenas)
        held = {usage.arena: usage for usage in (arena.usage() for arena in self.arenas)}
        for member in self.here:
            usage = held[member.spec.arena]
            assert usage.free + usage.cached + usage.owned == usage.total
            assert usage.total == usage.slabs * member.spec.slab_pages
            member.lost({page // member.spec.slab_pages for page in member.arena.pool.pages()})
            for id, task in member.tasks.items():
                assert member.arena.tasks[id].pages == task.pages
                if not task.moving and not task.away:
                    member.holds_its_own(task)


@pytest.mark.parametrize("seed", range(16))
def test_every_page_of_a_pool_is_accounted_for_and_holds_what_it_should(seed: int) -> None:
    walk = PoolWalk(seed)
    for _ in range(250):
        walk.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_hundred_thousand_operations_on_a_pool(seed: int) -> None:
    walk = PoolWalk(seed)
    for _ in range(1000):
        walk.step()

"""Pages of one pool that models lend each other: who gives slabs back to whom. No I/O and no clock.

Every model on a device has its share of the pool and uses what others leave. Who needs pages within its
share gets them from those that use more than theirs, whatever bands are at stake, and while it waits for them
nobody borrows; beyond its share it gets them from lower bands of those, if they use enough more. So no two
models take from each other in turn, and none starves. Of a lender that slab is emptied in which nobody runs,
else where the least urgent do, else with the least to compute again; never one with a task whose deadline
was promised.

A task that needs more than its model's share would wait for ever where the others use theirs. So one that
waited for ``AGING_SECONDS`` is *due*: all others of the pool lend it what it needs, out of their shares too,
nobody of theirs is seated until it has that, and it keeps it to its end. One of a pool is due at a time, and
the next no sooner than ``AGING_SECONDS`` after, so that the others have their shares meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from llmos.services.scheduler.host import Host
from llmos.services.scheduler.queue import AGING_SECONDS
from llmos.services.scheduler.task import Place, Swap, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core


class Claim(Enum):
    """What came of asking others for a slab."""

    NOBODY = "nobody"  # has to give one
    FREED = "freed"  # it is there
    COMING = "coming"  # its pages are being swapped out


@dataclass(frozen=True, slots=True)
class Debts:
    """Memory's word: slabs of a model's share that are not to be had, and the arenas that use more than
    theirs, with how many more."""

    owed: int = 0
    lenders: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, details: dict[str, Any]) -> Debts:
        """As it comes beside a refusal."""
        owed, lenders = details.get("owed"), details.get("lenders")
        return cls(owed, lenders) if isinstance(owed, int) and isinstance(lenders, dict) else cls()


class Lending:
    """The core's dealings between hosts of one pool."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ceding: list[Task] = []  # are swapped out for a neighbour
        self._stirred: dict[str, None] = {}  # models, in order, for whom pages may have become free
        self._freed: Counter[str] = Counter()  # by pool or arena: how often pages were given back
        self._hungry: dict[str, Task] = {}  # by arena: who waits for pages of its share
        self._large: dict[int, tuple[Task, Host]] = {}  # who waits for more than its share, and where
        self._due: dict[str, tuple[Task, Host]] = {}  # by pool: whose turn it is to have more
        self._rests: dict[str, float] = {}  # by pool: until when nobody is due

    def neighbours(self, host: Host) -> list[Host]:
        """The other hosts of a host's pool."""
        if not host.pool:
            return []
        return [other for other in self._core.hosts.values() if other is not host and other.pool == host.pool]

    def changed(self, host: Host) -> None:
        """A host came or went: the shares of its pool are others."""
        members = [*self.neighbours(host), *([host] if self._core.hosts.get(host.arena) is host else [])]
        for each in members:
            each.sharers = len(members)
        self._hungry.pop(host.arena, None)
        self._large = {id: (task, at) for id, (task, at) in self._large.items() if at is not host}
        if host.pool in self._due and self._due[host.pool][1] is host:
            del self._due[host.pool]
        self._tell()
        self.gave(host)

    def gave(self, host: Host) -> None:
        """Pages of a host were given back: its neighbours may have them."""
        self._freed[host.pool or host.arena] += 1
        for each in self.neighbours(host):
            each.short_of_pages = False
            self._stirred[each.model.model] = None

    def wake(self, now: float) -> None:
        """Seat whom the pages may help that were given back, and say who is due."""
        if self._large or self._due:
            self._appoint(now)
        for arena, task in list(self._hungry.items()):
            if task.place in (Place.ENDED, Place.STOPPED):
                self._feed(arena)
        while self._stirred:
            model = next(iter(self._stirred))
            del self._stirred[model]
            if model in self._core.queues and len(self._core.queues[model]):
                self._core.seating.admit(model, now)

    def left(self, host: Host) -> None:
        """Pages of a host have left the device: those of its neighbours who wait for that look for them."""
        for each in self.neighbours(host):
            parked = [task for task, _ in each.tiers.parked.values()]
            each.tiers.parked.clear()
            for task in parked:
                if task.place is Place.RESERVING:
                    self._core.paging.reserve(each, task)
        self.gave(host)

    def asks(self, host: Host, task: Task) -> None:
        """A task asks for pages."""
        task.asked = self._freed[host.pool or host.arena]

    def asked_in_vain(self, host: Host, task: Task) -> bool:
        """Whether a task was refused pages and none were given back meanwhile."""
        return task.asked == self._freed[host.pool or host.arena]

    def received(self, host: Host, task: Task) -> None:
        """A task of this host got pages that it asked for."""
        self._large.pop(task.id, None)
        if host.arena in self._hungry:
            self._feed(host.arena)
        elif self.due(host, task):
            self._tell()

    def lacks(self, host: Host, task: Task, needed: int) -> None:
        """A task waits again, since nobody had to lend it what it needs."""
        if self.due(host, task):
            self._tell()
        elif host.sharers > 1 and needed > host.guaranteed:
            self._large[task.id] = task, host

    def due(self, host: Host, task: Task) -> bool:
        """Whether all others lend to this task what it needs."""
        return host.pool in self._due and self._due[host.pool][0] is task

    def _appoint(self, now: float) -> None:
        """End the turns of those who are gone, and begin those of who waited longest."""
        gone = (Place.ENDED, Place.STOPPED)
        self._large = {id: each for id, each in self._large.items() if each[0].place not in gone}
        for pool, (task, _) in list(self._due.items()):
            if task.place in gone:
                del self._due[pool]
                self._rests[pool] = now + AGING_SECONDS
                self._tell()
        for task, host in sorted(self._large.values(), key=lambda each: (each[0].queued_at, each[0].id)):
            free = host.pool not in self._due and now >= self._rests.get(host.pool, 0.0)
            if free and now - task.queued_at > AGING_SECONDS:
                self._due[host.pool] = task, host
                host.short_of_pages = False
                self._stirred[host.model.model] = None
                self._tell()

    def _feed(self, arena: str) -> None:
        del self._hungry[arena]
        self._tell()

    def _tell(self) -> None:
        """Say who may borrow: not while another of the pool waits for its share, but for who is due; and who
        seats nobody, since another is."""
        for host in self._core.hosts.values():
            task, at = self._due.get(host.pool, (None, None))
            waits = task is not None and task.place is Place.RESERVING and not task.pages
            others = self.neighbours(host) if self._hungry else []
            hungry = any(other.arena in self._hungry for other in others)
            host.may_borrow = not hungry or (waits and at is host)
            yielded, host.yields = host.yields, waits and at is not host
            if yielded and not host.yields:
                self._stirred[host.model.model] = None

    def claim(self, host: Host, needy: Task, debts: Debts, lacking: int) -> Claim:
        """Let a lender empty a slab for a task of another model that lacks so many pages."""
        due = self.due(host, needy)
        lenders = [lender for lender in self.neighbours(host) if due or lender.arena in debts.lenders]
        count = -(-lacking // max(1, host.model.slab_pages))
        within = due or count <= debts.owed
        if within:
            self._hungry[host.arena] = needy
            self._tell()
        elif not host.may_borrow or count > sum(debts.lenders.values()):
            return Claim.NOBODY
        self._ceding = [task for task in self._ceding if task.swap is Swap.OUT]
        if any(task.arena == lender.arena for task in self._ceding for lender in self.neighbours(host)):
            return Claim.COMING
        found = _candidates(lenders, None if within else needy.urgency[0], self._kept(host))
        if not found or (not within and len(found) < count):
            return Claim.NOBODY
        lender, tasks = min(found, key=lambda each: _cost(each[1]))
        for task in tasks:
            if not self._core.paging.take(lender, task, needy):
                self._ceding.append(task)
        lender.short_of_pages = True
        return Claim.COMING if self._ceding else Claim.FREED

    def _kept(self, host: Host) -> Task | None:
        """Who of the pool keeps its pages, since it was its turn."""
        return self._due[host.pool][0] if host.pool in self._due else None


def _candidates(lenders: list[Host], rank: int | None, kept: Task | None) -> list[tuple[Host, list[Task]]]:
    """Each slab that could be emptied: whose it is, and the tasks that hold pages in it; with a ``rank`` only
    those of lower bands."""
    return [
        (lender, tasks)
        for lender in lenders
        for tasks in _by_slab(lender).values()
        if not any(t.id in lender.promised or t is kept for t in tasks)
        and (rank is None or min(t.urgency[0] for t in tasks) > rank)
    ]


def _by_slab(host: Host) -> dict[int, list[Task]]:
    """Who holds pages in each slab."""
    size, found = host.model.slab_pages, defaultdict[int, list[Task]](list)
    away = [task for task in host.tiers.away.values() if task.swap is Swap.AWAY]
    for task in (*host.keepers.values(), *host.running):
        for slab in {page // size for page in task.pages}:
            found[slab].append(task)
    if not found and away:
        # What only swapped tasks need on the device is in nobody's pages.
        found[-1].append(away[-1])
    return found


def _cost(tasks: list[Task]) -> tuple[bool, int, int]:
    seated = [task for task in tasks if task.slot >= 0]
    return bool(seated), -min((t.urgency[0] for t in seated), default=0), sum(t.computed for t in tasks)

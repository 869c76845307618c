"""Pages of one pool that models lend each other: who gives slabs back to whom. No I/O and no clock.

Every model on a device has its share of the pool and uses what others leave. Who needs pages within its
share gets them from those that use more than theirs, whatever bands are at stake, and while it waits for them
nobody borrows; beyond its share it gets them from lower bands of those, or for a task that grows from newer
ones, if they use enough more. So no two models take from each other in turn, and none starves.
Of a lender give way who is beyond its share, the most urgent and oldest being within it: first where nobody
runs, else the least urgent, else with the least to compute again; never one whose deadline was promised. Who
has just got its pages has them for a while (``lasting``): a claim is put off until then, and its lenders seat
nobody.

A task that needs more than its model's share would wait for ever where the others use theirs. So one that
waited for ``AGING_SECONDS`` is *due*: all others of the pool lend it what it needs, out of their shares too,
nobody of theirs is seated until it has that, and it keeps it to its end. One of a pool is due at a time, and
the next no sooner than ``AGING_SECONDS`` after, so that the others have their shares meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any

from llmos.services.scheduler import displace, lasting
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.queue import AGING_SECONDS
from llmos.services.scheduler.task import Place, Swap, Task
from llmos.services.scheduler.tiers import PATIENCE

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core
    from llmos.services.scheduler.paging import PageEffects

UNKNOWN = 0.005  # seconds in which memory's answers to those who have asked will be known


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

    def __init__(self, core: Core, effects: PageEffects) -> None:
        self._core = core
        self._effects = effects
        self._ceding: list[Task] = []  # are swapped out for a neighbour
        self._stirred: dict[str, None] = {}  # models, in order, for whom pages may have become free
        self._freed: Counter[str] = Counter()  # by pool or arena: how often pages were given back
        self._hungry: dict[str, Task] = {}  # by arena: who waits for pages of its share
        self._large: dict[int, tuple[Task, Host]] = {}  # who waits for more than its share, and where
        self._due: dict[str, tuple[Task, Host]] = {}  # by pool: whose turn it is to have more
        self._rests: dict[str, float] = {}  # by pool: until when nobody is due
        # By arena: when those who have pages of its share will have had their time, and their arenas.
        self._put_off: dict[str, tuple[float, set[str]]] = {}

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
        for arena in [arena for arena, (at, _) in self._put_off.items() if at <= now]:
            del self._put_off[arena]
            self._tell()
            if (host := self._core.hosts.get(arena)) is not None:
                host.short_of_pages = False
                self._stirred[host.model.model] = None
        while self._stirred:
            model = next(iter(self._stirred))
            del self._stirred[model]
            if model in self._core.queues and len(self._core.queues[model]):
                self._core.seating.admit(model, now)

    def tighten(self, host: Host) -> None:
        """Pages are short on a host, and so for its neighbours."""
        for each in (host, *self.neighbours(host)):
            each.tight = True

    def relax(self, hosts: list[Host]) -> None:
        """Nobody waits for these hosts: pages are short only if somebody does beside them."""
        for host in hosts:
            if host.tight:
                around = (host, *self.neighbours(host))
                host.tight = any(len(self._core.queues[each.model.model]) for each in around)

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
        if self._put_off.pop(host.arena, None) or self.due(host, task):
            self._tell()
        if host.arena in self._hungry:
            self._feed(host.arena)

    def lacks(self, host: Host, task: Task, needed: int) -> None:
        """A task waits again, since nobody had to lend it the pages that it needs in all."""
        if self.due(host, task):
            self._tell()
        elif host.sharers > 1 and needed > host.guaranteed:
            if task.id not in self._large:
                self._effects.wake(AGING_SECONDS)
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
        for task, host in sorted(self._large.values(), key=lambda each: _turn(each[0])):
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
            host.favoured = task if at is host else None
            host.may_borrow = not hungry or (waits and at is host)
            cedes = any(host.arena in lenders for _, lenders in self._put_off.values())
            yielded, host.yields = host.yields, cedes or (waits and at is not host)
            if yielded and not host.yields:
                self._stirred[host.model.model] = None

    def claim(self, host: Host, needy: Task, debts: Debts, lacking: int, more: int, now: float) -> Claim:
        """Let a lender empty a slab for a task of another model that lacks so many pages, and will hold
        ``more`` than its model does now."""
        due = self.due(host, needy)
        lenders = [lender for lender in self.neighbours(host) if due or lender.arena in debts.lenders]
        count = -(-lacking // max(1, host.model.slab_pages))
        within = due or (count <= debts.owed and _held(host) + more <= host.guaranteed)
        if within:
            self._hungry[host.arena] = needy
            self._tell()
        elif not host.may_borrow or count > sum(debts.lenders.values()):
            return Claim.NOBODY
        self._ceding = [task for task in self._ceding if task.swap is Swap.OUT]
        if any(task.arena == lender.arena for task in self._ceding for lender in self.neighbours(host)):
            return Claim.COMING
        gives = (lambda task: True) if within else _gives_way_to(needy)
        found = _candidates(lenders, gives, within, self._kept(host))
        if len(found) < count:
            if within and any(t.place is Place.RESERVING for lender in lenders for t in lender.running):
                self._put_off_until(now + UNKNOWN, now, host, lenders)
            return Claim.NOBODY
        if needy.place is not Place.RUNNING and needy.id not in host.promised:
            free = [_free_from(lender, tasks, needy) for lender, tasks in found]
            if (at := sorted(free)[count - 1]) > now:
                self._put_off_until(at, now, host, lenders)
                return Claim.NOBODY
            found = [each for each, start in zip(found, free, strict=True) if start <= now]
        lender, tasks = min(found, key=lambda each: _cost(*each))
        for task in tasks:
            if not self._core.paging.take(lender, task, needy):
                self._ceding.append(task)
        lender.short_of_pages = True
        return Claim.COMING if self._ceding else Claim.FREED

    def _put_off_until(self, at: float, now: float, host: Host, lenders: list[Host]) -> None:
        """A claim has to wait; its lenders seat nobody meanwhile."""
        self._put_off[host.arena] = at, {lender.arena for lender in lenders}
        self._tell()
        self._effects.wake(at - now)

    def _kept(self, host: Host) -> Task | None:
        """Who of the pool keeps its pages, since it was its turn."""
        return self._due[host.pool][0] if host.pool in self._due else None


def _candidates(
    lenders: list[Host], gives: Callable[[Task], bool], within: bool, kept: Task | None
) -> list[tuple[Host, list[Task]]]:
    """Each slab that could be emptied: whose it is, and the tasks that hold pages in it, all of which give
    way. Only for a claim ``within`` a share those of a lender's own share do, where slabs are in pieces."""
    return [
        (lender, tasks)
        for lender in lenders
        for tasks in _by_slab(lender).values()
        if not any(t.id in lender.promised or t is kept for t in tasks)
        and (within or not any(t.id in _entitled(lender) for t in tasks))
        and all(gives(t) for t in tasks)
    ]


def _gives_way_to(needy: Task) -> Callable[[Task], bool]:
    """As among the tasks of one model: to who asks for a seat lower bands give way, and to who runs whoever
    came later as well."""
    if needy.place is Place.RUNNING:
        return lambda task: displace.expendable(task) > displace.expendable(needy)
    return lambda task: task.urgency[0] > needy.urgency[0]


def _entitled(host: Host) -> set[int]:
    """The tasks within their model's share: those that fit in it, the most urgent and oldest first."""
    room, found = host.guaranteed, set[int]()
    for task in sorted((*host.keepers.values(), *host.running), key=displace.expendable):
        if len(task.pages) <= room:
            room -= len(task.pages)
            found.add(task.id)
    return found


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


def _free_from(lender: Host, tasks: list[Task], needy: Task) -> float:
    """When a slab may be emptied for a task: none loses more than is worth it, as far as who is more urgent
    can wait."""
    return max(
        min(
            lasting.due_back(lender, task),
            task.housed_at + PATIENCE[needy.rank] if task.urgency[0] > needy.urgency[0] else inf,
        )
        for task in tasks
    )


def _turn(task: Task) -> tuple[bool, float, int]:
    """Of those who wait for more than their share: realtime, then who waits for longest."""
    return task.rank > 0, task.queued_at, task.id


def _held(host: Host) -> int:
    """How many different pages a model's tasks hold."""
    return len({page for task in (*host.keepers.values(), *host.running) for page in task.pages})


def _cost(lender: Host, tasks: list[Task]) -> tuple[bool, bool, int, int]:
    seated, entitled = [task for task in tasks if task.slot >= 0], _entitled(lender)
    return (
        any(task.id in entitled for task in tasks),
        bool(seated),
        -min((t.urgency[0] for t in seated), default=0),
        sum(t.computed for t in tasks),
    )

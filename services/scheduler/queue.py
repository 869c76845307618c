"""Who is next: strict bands; in realtime the earliest deadline; else fair between tenants, first come first.

Fairness is by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
each tenant is charged for what it is served, prompt tokens at 1 and produced tokens at 2, divided by its
weight; the waiting tenant with the smallest counter goes first; one that was idle starts at the smallest
counter of those that are active, so that idleness saves up no credit. Every look costs O(log tenants).
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Protocol

from llmos.services.scheduler.task import Place, Task

PROMPT_CHARGE = 1.0
OUTPUT_CHARGE = 2.0
AGING_SECONDS = 30.0
AGED_EVERY = 8  # one in so many interactive turns goes to a batch task that waited for AGING_SECONDS
REALTIME_LOOKAHEAD = 8  # how many are passed over whose tenants are at a limit

Eligible = Callable[[Task], bool]
Line = deque[tuple[int, Task]]
Key = tuple[float, float, int]


class Payer(Protocol):
    """Whom something is charged to: a task, or a job for an encoder."""

    @property
    def tenant(self) -> str: ...
    @property
    def weight(self) -> float: ...


class Counters:
    """The virtual token counter of each tenant. It falls only by ``refund``."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._order: list[tuple[float, str]] = []
        self._last = 0.0

    def enter(self, tenant: str) -> None:
        """A task of this tenant arrived; lift the counter of one that was idle."""
        count = self._active.get(tenant, 0)
        if not count:
            self.served[tenant] = max(self.served.get(tenant, 0.0), self._floor())
            heapq.heappush(self._order, (self.served[tenant], tenant))
        self._active[tenant] = count + 1

    def leave(self, tenant: str) -> None:
        """A task of this tenant ended."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            self._last = self.served[tenant]

    def active(self, tenant: str) -> int:
        """How many tasks and jobs of a tenant have arrived and not ended."""
        return self._active.get(tenant, 0)

    def refund(self, task: Payer, prompt: int) -> None:
        """A prompt was charged for, and so many of its tokens were cached."""
        self.served[task.tenant] -= PROMPT_CHARGE * prompt / task.weight
        heapq.heappush(self._order, (self.served[task.tenant], task.tenant))

    def charge(self, task: Payer, prompt: int, output: int) -> None:
        """Tokens were served to a task."""
        cost = (PROMPT_CHARGE * prompt + OUTPUT_CHARGE * output) / task.weight
        self.served[task.tenant] = self.served.get(task.tenant, 0.0) + cost

    def _floor(self) -> float:
        """The smallest counter of an active tenant; where none is, that of the one who left last."""
        order = self._order
        while order:
            noted, tenant = order[0]
            if tenant not in self._active:
                heapq.heappop(order)
            elif noted != self.served[tenant]:
                heapq.heapreplace(order, (self.served[tenant], tenant))
            else:
                return noted
        return self._last


class _Heads:
    """The first in each tenant's line, in order of a key that only rises while a head stays the same.

    Entries are not moved when a key rises or a head changes; they are mended when they come up.
    """

    def __init__(self, lines: dict[str, Line], key: Callable[[Task], Key]) -> None:
        self._lines = lines
        self._key = key
        self._heap: list[tuple[Key, str]] = []
        self._noted: dict[str, Key] = {}

    def changed(self, tenant: str) -> None:
        """A tenant's line has a new head."""
        self._note(tenant, self._key(self._lines[tenant][0][1]))

    def first(self, eligible: Eligible) -> Task | None:
        passed, found = [], None
        while self._heap:
            key, tenant = self._heap[0]
            line = _drop_gone(self._lines, tenant)
            if not line or self._noted.get(tenant) != key:
                heapq.heappop(self._heap)
                if not line and self._noted.get(tenant) == key:
                    del self._noted[tenant]
                continue
            head = line[0][1]
            if (current := self._key(head)) != key:
                self._noted[tenant] = current
                heapq.heapreplace(self._heap, (current, tenant))
                continue
            if eligible(head):
                found = head
                break
            passed.append(heapq.heappop(self._heap))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def least(self) -> float:
        """No head has a key whose first part is less, but for one that was put before others of its line."""
        return self._heap[0][0][0] if self._heap else float("inf")

    def _note(self, tenant: str, key: Key) -> None:
        if self._noted.get(tenant) != key:
            self._noted[tenant] = key
            heapq.heappush(self._heap, (key, tenant))


class TaskQueue:
    """The waiting tasks of one model; a task that was taken out otherwise is skipped when it comes up."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._realtime: list[tuple[float, float, int, int, Task]] = []
        self._lines: dict[int, dict[str, Line]] = {1: {}, 2: {}}
        self._turns = {rank: _Heads(lines, self._turn) for rank, lines in self._lines.items()}
        self._aged = _Heads(self._lines[2], _age)
        self._since_aged = 0
        self.waiting: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        yield from (task for *_, ticket, task in sorted(self._realtime) if _waits(ticket, task))
        for band in self._lines.values():
            for line in band.values():
                yield from (task for ticket, task in line if _waits(ticket, task))

    def push(self, task: Task, *, front: bool = False) -> None:
        """Enter a task; ``front`` for one that was displaced, which keeps its place in its tenant's line."""
        task.place = Place.WAITING
        task.ticket += 1
        self._size += 1
        self.waiting[task.tenant] += 1
        if task.rank == 0:
            due = task.deadline or float("inf")
            heapq.heappush(self._realtime, (due, task.arrived, task.id, task.ticket, task))
            return
        lines = self._lines[task.rank]
        line = lines.setdefault(task.tenant, deque())
        line.appendleft((task.ticket, task)) if front else line.append((task.ticket, task))
        _drop_gone(lines, task.tenant)
        self._turns[task.rank].changed(task.tenant)
        if task.rank == 2:
            self._aged.changed(task.tenant)

    def remove(self, task: Task, place: Place = Place.ENDED) -> None:
        """Take a waiting task out of turn."""
        task.place = place
        self._size -= 1
        self.waiting[task.tenant] -= 1
        if not self.waiting[task.tenant]:
            del self.waiting[task.tenant]

    def refunded(self, tenant: str) -> None:
        """A tenant's counter fell: its turn may come sooner."""
        for rank, lines in self._lines.items():
            _drop_gone(lines, tenant)
            if tenant in lines:
                self._turns[rank].changed(tenant)

    def interactive(self, tenant: str) -> bool:
        """Whether a tenant has interactive work waiting."""
        return _drop_gone(self._lines[1], tenant) is not None

    def peek(self, now: float, eligible: Eligible = lambda task: True, vacant: bool = True) -> Task | None:
        """The task to serve next; ``eligible`` passes over tenants that are at a limit. Only a ``vacant``
        slot goes to who waited for long: no one is displaced for that."""
        if self._realtime and (task := self._peek_realtime(eligible)) is not None:
            return task
        interactive = self._turns[1].first(eligible)
        if interactive is None:
            return self._turns[2].first(eligible)
        if vacant and self._since_aged >= AGED_EVERY - 1 and now - self._aged.least() > AGING_SECONDS:
            aged = self._aged.first(eligible)
            if aged is not None and now - aged.queued_at > AGING_SECONDS:
                return aged
        return interactive

    def take(self, task: Task, now: float = 0.0) -> None:
        """Take out a task that ``peek`` named. A batch task that waited too long is not displaced by
        interactive ones while it has its slot."""
        self.remove(task, Place.RESERVING)
        task.promoted = task.rank == 2 and now - task.queued_at > AGING_SECONDS
        if task.rank == 1:
            self._since_aged += 1
        elif task.promoted:
            self._since_aged = 0

    def _peek_realtime(self, eligible: Eligible) -> Task | None:
        heap, found = self._realtime, None
        passed: list[tuple[float, float, int, int, Task]] = []
        while heap and len(passed) < REALTIME_LOOKAHEAD:
            *_, ticket, task = heap[0]
            if not _waits(ticket, task):
                heapq.heappop(heap)
            elif eligible(task):
                found = task
                break
            else:
                passed.append(heapq.heappop(heap))
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

    def _turn(self, task: Task) -> Key:
        return self._counters.served.get(task.tenant, 0.0), task.queued_at, task.id


def _age(task: Task) -> Key:
    return task.queued_at, 0.0, task.id


def _drop_gone(lines: dict[str, Line], tenant: str) -> Line | None:
    """A tenant's line, without those before the first that waits; None where nobody does."""
    line = lines.get(tenant)
    while line:
        ticket, task = line[0]
        if task.ticket == ticket and task.place is Place.WAITING:
            return line
        line.popleft()
    if line is not None:
        del lines[tenant]
    return None


def _waits(ticket: int, task: Task) -> bool:
    return task.place is Place.WAITING and task.ticket == ticket

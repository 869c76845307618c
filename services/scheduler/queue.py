"""Who is next: strict bands; in realtime the earliest deadline; else fair between tenants, first come first.

Fairness is by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
each tenant is charged for what it is served, prompt tokens at 1 and produced tokens at 2, divided by its
weight; the waiting tenant with the smallest counter goes first; one that was idle starts at the smallest
counter of those that are active, so that idleness saves up no credit.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator

from llmos.services.scheduler.task import Place, Task

PROMPT_CHARGE = 1.0
OUTPUT_CHARGE = 2.0
AGING_SECONDS = 30.0
REALTIME_LOOKAHEAD = 8  # how many are passed over whose tenants are at a limit

Eligible = Callable[[Task], bool]


class Counters:
    """The virtual token counter of each tenant."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """A task of this tenant arrived; lift the counter of one that was idle."""
        if not self._active.get(tenant):
            floor = min((self.served[t] for t, n in self._active.items() if n), default=0.0)
            self.served[tenant] = max(self.served.get(tenant, 0.0), floor)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A task of this tenant ended."""
        self._active[tenant] -= 1

    def charge(self, task: Task, prompt: int, output: int) -> None:
        """Tokens were served to a task."""
        cost = (PROMPT_CHARGE * prompt + OUTPUT_CHARGE * output) / task.weight
        self.served[task.tenant] = self.served.get(task.tenant, 0.0) + cost


class TaskQueue:
    """The waiting tasks of one model; a task that was taken out otherwise is skipped when it comes up."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._realtime: list[tuple[float, float, int, Task]] = []
        self._fair: dict[int, dict[str, deque[Task]]] = {1: {}, 2: {}}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        yield from (task for *_, task in sorted(self._realtime, key=_due) if _waits(task))
        for band in self._fair.values():
            for tasks in band.values():
                yield from (task for task in tasks if _waits(task))

    def push(self, task: Task, *, front: bool = False) -> None:
        """Enter a task; ``front`` for one that was displaced, which keeps its place in its tenant's line."""
        task.place = Place.WAITING
        self._size += 1
        if task.rank == 0:
            due = task.deadline or float("inf")
            heapq.heappush(self._realtime, (due, task.arrived, task.id, task))
            return
        line = self._fair[task.rank].setdefault(task.tenant, deque())
        line.appendleft(task) if front else line.append(task)

    def remove(self, task: Task) -> None:
        """Take a waiting task out of turn."""
        task.place = Place.ENDED
        self._size -= 1

    def peek(self, now: float, eligible: Eligible = lambda task: True) -> Task | None:
        """The task to serve next; ``eligible`` passes over tenants that are at a limit."""
        self._drop_gone()
        for *_, task in heapq.nsmallest(REALTIME_LOOKAHEAD, self._realtime, key=_due):
            if _waits(task) and eligible(task):
                return task
        aged = [line[0] for line in self._fair[2].values() if now - line[0].queued_at > AGING_SECONDS]
        for heads in ([*self._heads(1), *aged], self._heads(2)):
            ready = [task for task in heads if eligible(task)]
            if ready:
                return min(ready, key=self._turn)
        return None

    def take(self, task: Task) -> None:
        """Take out a task that ``peek`` named."""
        task.place = Place.RESERVING
        self._size -= 1
        if task.rank == 0:
            self._realtime = [entry for entry in self._realtime if entry[-1] is not task]
            heapq.heapify(self._realtime)
        self._drop_gone()

    def _turn(self, task: Task) -> tuple[float, float, int]:
        return self._counters.served.get(task.tenant, 0.0), task.queued_at, task.id

    def _heads(self, rank: int) -> list[Task]:
        return [line[0] for line in self._fair[rank].values()]

    def _drop_gone(self) -> None:
        while self._realtime and not _waits(self._realtime[0][-1]):
            heapq.heappop(self._realtime)
        for band in self._fair.values():
            for tenant in list(band):
                line = band[tenant]
                while line and not _waits(line[0]):
                    line.popleft()
                if not line:
                    del band[tenant]


def _due(entry: tuple[float, float, int, Task]) -> tuple[float, float, int]:
    return entry[:3]


def _waits(task: Task) -> bool:
    return task.place is Place.WAITING

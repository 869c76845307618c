"""The policies: ours, and what others do, on the same core, memory and device.

Only the order of service differs. Each has chunked prefill, continuous batching, a prefix cache and
recomputation after a task lost its pages; none of the others refuses, keeps steps short, or knows tenants.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from llmos.services.scheduler import displace
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.order import Order
from llmos.services.scheduler.queue import Counters, Eligible, TaskQueue
from llmos.services.scheduler.simulator import Simulator
from llmos.services.scheduler.steptime import StepTimes
from llmos.services.scheduler.task import Place, Task

Key = tuple[float, ...]


class OrderedQueue(TaskQueue):
    """Waiting tasks by a key that is fixed while they wait."""

    def __init__(self, counters: Counters, key: Callable[[Task], Key]) -> None:
        super().__init__(counters)
        self._key = key
        self._heap: list[tuple[Key, int, int, Task]] = []

    def push(self, task: Task, *, front: bool = False) -> None:
        task.place = Place.WAITING
        task.ticket += 1
        self._size += 1
        self.waiting[task.tenant] += 1
        heapq.heappush(self._heap, (self._key(task), task.id, task.ticket, task))

    def peek(self, now: float, eligible: Eligible = lambda task: True, vacant: bool = True) -> Task | None:
        while self._heap:
            *_, ticket, task = self._heap[0]
            if task.place is Place.WAITING and task.ticket == ticket:
                return task if eligible(task) else None
            heapq.heappop(self._heap)
        return None


class NoStepTimes(StepTimes):
    """Learns nothing, so that no prefill is held down."""

    def observe(self, rows: int, context: int, prefilled: int, seconds: float, now: float = 0.0) -> None:
        return


class Fcfs(Order):
    """First come, first served, whoever it is: vLLM's default."""

    promises = shares = waits = False

    def queue(self, counters: Counters) -> TaskQueue:
        return OrderedQueue(counters, self.key)

    def prepare(self, host: Host) -> None:
        host.times = NoStepTimes()

    def key(self, task: Task) -> Key:
        return (task.arrived,)

    def for_slot(self, task: Task, running: list[Task]) -> Task | None:
        return None

    def for_pages(self, host: Host, task: Task, needed: int) -> Task | None:
        """Who runs and lacks pages takes those of the last in order; who waits, waits."""
        if task.place is not Place.RUNNING:
            return displace.keeper(host.keepers.values(), task, needed)
        others = [
            t for t in [*host.keepers.values(), *host.running] if t.pages and self.key(t) > self.key(task)
        ]
        return max(others, key=self.key, default=None)


class VllmPriority(Fcfs):
    """vLLM's ``--scheduling-policy priority``: by priority, then arrival. A running task loses its pages to a
    more important one, never its slot."""

    def key(self, task: Task) -> Key:
        return task.rank, task.arrived


class Mlfq(Fcfs):
    """FastServe's skip-join multi-level feedback queue (Wu et al., 2023): a task joins the level whose
    quantum its prefill fits, and falls a level each time it has used its quantum; a lower level gives up its
    slot, and keeps its pages while nobody needs them."""

    QUANTUM = 0.05  # seconds of the first level; each next has twice as much
    PREFILL, TOKEN = 2.1e-5, 1.0e-2  # seconds that a task is charged for
    LEVELS = 10

    def level(self, task: Task) -> int:
        used = task.prompt * self.PREFILL + task.produced * self.TOKEN
        level = 0
        while level < self.LEVELS and used > self.QUANTUM * (2 ** (level + 1) - 1):
            level += 1
        return level

    def key(self, task: Task) -> Key:
        return self.level(task), task.queued_at, task.arrived

    def for_slot(self, task: Task, running: list[Task]) -> Task | None:
        mine = self.level(task)
        lower = [t for t in running if t.place is Place.RUNNING and self.level(t) > mine]
        return max(lower, key=self.key, default=None)


POLICIES: dict[str, Callable[[], Order]] = {
    "LLM OS": Order,
    "FCFS": Fcfs,
    "vLLM priority": VllmPriority,
    "FastServe MLFQ": Mlfq,
}


def core(policy: str) -> Callable[[Simulator, int], Core]:
    """A core of a policy, for the simulator."""
    return lambda simulator, max_steps: Core(simulator, max_steps, order=POLICIES[policy]())

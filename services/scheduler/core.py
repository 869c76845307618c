"""What the scheduler does on every event. No I/O and no clock: the server hands in events with the time, and
effects leave through an interface, which a simulator implements as well as the server does.

A task's way: ``submit`` queues it; ``_admit`` seats it in a slot and asks memory for pages; ``reserved``
makes it ready; ``_run`` composes it into a quantum; ``step`` records its tokens; ``_finish`` ends it.
"""

from __future__ import annotations

import itertools
from typing import Protocol

from llmos.drivers.sdk.messages import LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.errors import IOFailure, LLMOSError
from llmos.services.scheduler import displace
from llmos.services.scheduler.compose import compose
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.queue import Counters, TaskQueue
from llmos.services.scheduler.task import Place, Task

AHEAD = 4  # quanta whose pages a task is given ahead of need


class Effects(Protocol):
    """What the core asks for; answers come back as events."""

    def reserve(self, host: Host, task: Task, extra: int) -> None: ...
    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None: ...
    def free(self, host: Host, tasks: list[Task]) -> None: ...
    def commit(self, host: Host, tasks: list[Task]) -> None: ...
    def execute(self, host: Host, quantum: Quantum) -> None: ...
    def preempt(self, host: Host, quantum: int) -> None: ...
    def emit(self, produced: list[Produced]) -> None: ...
    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None: ...


class Core:
    """Queues, hosts and counters; ``now`` is in seconds on any monotonic clock."""

    def __init__(self, effects: Effects, max_steps: int) -> None:
        self._effects = effects
        self._max_steps = max_steps
        self._quanta = itertools.count(1)
        self.counters = Counters()
        self.hosts: dict[str, Host] = {}
        self.queues: dict[str, TaskQueue] = {}
        self.models: dict[str, LoadedModel] = {}
        self.tasks: dict[int, Task] = {}
        self.finished = 0
        self.displaced = 0

    # --- events: tasks ---

    def submit(self, task: Task, now: float) -> None:
        """A task arrived, and was found admissible."""
        task.queued_at = now
        self.tasks[task.id] = task
        self.counters.enter(task.tenant)
        self.queues[task.model].push(task)
        self._pump(task.model, now)

    def kill(self, task: Task, error: LLMOSError, now: float) -> None:
        """End a task wherever it is."""
        if task.place is not Place.ENDED:
            self._finish(task, None, error)
            self._pump(task.model, now)

    def running_of(self, tenant: str) -> int:
        return sum(t.tenant == tenant for host in self.hosts.values() for t in host.running)

    # --- events: hosts ---

    def add_host(self, host: Host, now: float) -> None:
        """A driver is ready to execute quanta for a model; its pages are empty."""
        host.ready = True
        self.models[host.model.model] = host.model
        self.hosts[host.arena] = host
        self.queues.setdefault(host.model.model, TaskQueue(self.counters))
        self._pump(host.model.model, now)

    def lose_host(self, host: Host, now: float) -> None:
        """A driver is gone, and all KV with it; its tasks start again from the tokens they have."""
        if self.hosts.pop(host.arena, None) is None:
            return
        for task in sorted(host.running, key=lambda t: t.arrived, reverse=True):
            host.leave(task)
            self._requeue(task)
        for task in [*self.queues[host.model.model]]:
            if task.arena == host.arena:
                task.pages, task.computed, task.growing = [], 0, False
                task.residence += 1
        self._pump(host.model.model, now)

    def fail_host(self, host: Host, error: LLMOSError, now: float) -> None:
        """A quantum failed on the device: its tasks end with the error, the others start again."""
        for task in {task for flight in host.flight for task in flight.tasks}:
            self._finish(task, None, IOFailure(f"the driver failed: {error}"))
        self.lose_host(host, now)

    # --- events: memory ---

    def reserved(self, host: Host, task: Task, pages: list[int], cached: int, now: float) -> None:
        """Memory gave a seated task its pages."""
        if task.place is not Place.RESERVING or self.hosts.get(host.arena) is not host:
            self._effects.free(host, [task])
            return
        task.committed, task.shared_pages = len(task.tokens), cached // host.model.page_tokens
        if task.first_cached < 0:
            task.first_cached = cached
        host.begin(task, pages, cached)
        self._run(host, now)

    def refused(self, host: Host, task: Task, now: float) -> None:
        """Memory has no pages for a seated task: take them from one of a lower band, or wait."""
        if task.place is not Place.RESERVING or self.hosts.get(host.arena) is not host:
            return
        victim = self._page_victim(host, task)
        if victim is not None and (victim.place is Place.WAITING or victim.rank > task.rank):
            self._take_pages(host, victim)
            self._reserve(host, task)
            return
        host.leave(task)
        self.queues[task.model].push(task, front=True)
        host.short_of_pages = True

    def grown(self, host: Host, gets: list[tuple[Task, int, list[int]]], now: float) -> None:
        """Memory's answer to ``grow``: (task, its residence when asked, pages)."""
        failed = False
        for task, residence, pages in gets:
            if task.residence != residence or task.place is Place.ENDED:
                continue
            task.growing = False
            if pages:
                host.grow(task, pages)
            elif task.place is Place.RUNNING:
                failed = True
                self._take_pages(host, self._page_victim(host, task) or task)
        # Nobody new is let in before those who run have what they need: they would take it from each other.
        host.short_of_pages = failed
        self._run(host, now)
        self._admit(host, now)

    # --- events: the driver ---

    def step(self, host: Host, step: Step, now: float) -> None:
        """A step's tokens arrived."""
        produced = host.apply(step)
        for item in produced:
            if not item.task.first_token_at:
                item.task.first_token_at = now
            self.counters.charge(item.task, 0, len(item.tokens))
        self._effects.emit(produced)
        for item in produced:
            if item.finished is not None:
                self._finish(item.task, "stop" if item.finished == "stop" else "length", None)

    def done(self, host: Host, done: QuantumDone, now: float) -> None:
        """A quantum ended."""
        flight = next(f for f in host.flight if f.quantum.id == done.quantum)
        host.done(done)
        full = [task for task in flight.tasks if self._filled_page(host, task)]
        if full:
            self._effects.commit(host, full)
        self._pump(host.model.model, now)

    # --- what follows from them ---

    def _pump(self, model: str, now: float) -> None:
        for host in sorted(self.hosts.values(), key=lambda h: len(h.running)):
            if host.model.model == model:
                self._admit(host, now)
                self._run(host, now)

    def _admit(self, host: Host, now: float) -> None:
        """Seat waiting tasks while there are slots, or tasks of a lower band in them."""
        queue = self.queues[host.model.model]
        while (task := queue.peek(now, self._eligible)) is not None:
            crowded = host.short_of_pages and host.running
            if crowded and not task.pages and not self._page_victim_exists(host, task):
                return
            slot = host.free_slot()
            if slot is None:
                victim = displace.for_slot(task, host.running)
                if victim is None:
                    return
                self._displace(host, victim)
                slot = host.free_slot()
            assert slot is not None
            queue.take(task)
            host.seat(task, slot)
            task.started_at = task.started_at or now
            if task.pages and task.arena == host.arena:
                host.begin(task, task.pages, min(task.computed, len(task.tokens) - 1))
                continue
            if task.pages:
                self._free(self.hosts[task.arena], task)
            task.arena = host.arena
            self._reserve(host, task)

    def _run(self, host: Host, now: float) -> None:
        """Keep a quantum queued behind the running one; take the device back for who should not wait."""
        if self._worth_preempting(host):
            host.draining = True
            self._effects.preempt(host, host.flight[-1].quantum.id)
        while host.can_compose:
            quantum = compose(host, next(self._quanta), self._max_steps)
            if quantum is None:
                break
            host.sent(quantum)
            self._effects.execute(host, quantum)
            for start in quantum.start:
                task = host.slots[start.slot]
                if task is not None:
                    self.counters.charge(task, len(start.tokens) - start.cached, 0)
        self._grow(host)

    def _worth_preempting(self, host: Host) -> bool:
        urgent = any(task.rank < 2 for task in host.starting)
        return urgent and not host.draining and sum(f.quantum.steps - f.received for f in host.flight) > 2

    def _grow(self, host: Host) -> None:
        """Ask ahead for the pages that running tasks will need."""
        wants = []
        for task in host.running:
            if task.place is not Place.RUNNING or task.growing:
                continue
            if host.capacity(task) < min(task.limit, task.planned + 2 * self._max_steps):
                target = min(task.limit, task.planned + AHEAD * self._max_steps)
                wants.append((task, host.pages_for(target) - len(task.pages)))
                task.growing = True
        if wants:
            self._effects.grow(host, wants)

    def _reserve(self, host: Host, task: Task) -> None:
        extra = min(task.limit - len(task.tokens), AHEAD * self._max_steps)
        self._effects.reserve(host, task, extra)

    def _filled_page(self, host: Host, task: Task) -> bool:
        pages = task.computed // host.model.page_tokens
        filled, task.shared_pages = pages > task.shared_pages, max(pages, task.shared_pages)
        return filled

    def _page_victim(self, host: Host, task: Task) -> Task | None:
        waiting = displace.keeper(self.queues[host.model.model], task)
        return waiting or displace.for_pages(task, host.running)

    def _page_victim_exists(self, host: Host, task: Task) -> bool:
        victim = self._page_victim(host, task)
        return victim is not None and (victim.place is Place.WAITING or victim.rank > task.rank)

    def _displace(self, host: Host, task: Task) -> None:
        """A running task gives up its slot and keeps its pages. What is in flight for it is dropped: its
        randomness is keyed by position, so it will produce the same tokens again."""
        host.leave(task)
        self._requeue(task)

    def _take_pages(self, host: Host, task: Task) -> None:
        """A task gives up its pages, and its slot if it has one; what was committed stays as prefix cache."""
        self._free(host, task)
        if task.place is not Place.WAITING:
            host.leave(task)
            self._requeue(task)

    def _requeue(self, task: Task) -> None:
        self.displaced += 1
        task.displaced += 1
        self.queues[task.model].push(task, front=True)

    def _free(self, host: Host, task: Task) -> None:
        """Give a task's pages back; what it is still given on an older request is not for it any more."""
        self._effects.free(host, [task])
        task.pages, task.computed, task.growing = [], 0, False
        task.residence += 1
        host.short_of_pages = False

    def _eligible(self, task: Task) -> bool:
        return not task.max_running or self.running_of(task.tenant) < task.max_running

    def _finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        host = self.hosts.get(task.arena)
        if task.place is Place.WAITING:
            self.queues[task.model].remove(task)
        elif host is not None:
            host.leave(task)
        # While RESERVING the pages are on their way: ``reserved`` gives them back.
        if task.pages and host is not None:
            self._free(host, task)
        task.place = Place.ENDED
        self.counters.leave(task.tenant)
        del self.tasks[task.id]
        self.finished += 1
        self._effects.finish(task, reason, error)

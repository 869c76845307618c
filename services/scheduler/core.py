"""What the scheduler does on every event. No I/O and no clock: the server hands in events with the time, and
effects leave through an interface, which a simulator implements as well as the server does.

A task's way: ``submit`` queues it; ``seating`` gives it a slot and ``paging`` asks memory for its pages and
makes it ready; ``run`` composes it into a quantum; ``step`` records its tokens; ``finish`` ends it. Events
of memory go to ``paging``, those of other tiers to ``swapping``.
"""

from __future__ import annotations

import itertools
from typing import Protocol

from llmos.drivers.sdk.messages import LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.errors import IOFailure, LLMOSError
from llmos.ipc.grant import Band
from llmos.services.scheduler import promises
from llmos.services.scheduler.compose import compose
from llmos.services.scheduler.headroom import SHARE
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.lending import Lending
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.order import Order
from llmos.services.scheduler.paging import PageEffects, Paging
from llmos.services.scheduler.queue import Counters, TaskQueue
from llmos.services.scheduler.seating import Seating
from llmos.services.scheduler.swapping import SwapEffects, Swapping
from llmos.services.scheduler.task import Place, Task


class Effects(PageEffects, SwapEffects, Protocol):
    """What the core asks for; answers come back as events."""

    def execute(self, host: Host, quantum: Quantum) -> None: ...
    def preempt(self, host: Host, quantum: int) -> None: ...
    def emit(self, produced: list[Produced]) -> None: ...
    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None: ...


class Core:
    """Queues, hosts and counters; ``now`` is in seconds on any monotonic clock."""

    def __init__(
        self, effects: Effects, max_steps: int, share: float = SHARE, order: Order | None = None
    ) -> None:
        self._effects = effects
        self._max_steps = max_steps
        self._order = order or Order()
        self._quanta = itertools.count(1)
        self.counters = Counters()
        self.seating = Seating(self, self._order, share)
        self.paging = Paging(self, effects, self._order, max_steps)
        self.swapping = Swapping(self, effects)
        self.lending = Lending(self, effects)
        self.hosts: dict[str, Host] = {}
        self.queues: dict[str, TaskQueue] = {}
        self.models: dict[str, LoadedModel] = {}
        self.tasks: dict[int, Task] = {}
        self.finished = 0

    # --- events: tasks ---

    def submit(self, task: Task, now: float) -> None:
        """A task arrived, and was found admissible. A realtime task whose deadline cannot be kept is refused
        by TimedOut or NoMemory with ``earliest``, before any effect."""
        self._promise(task, now)
        task.queued_at = now
        self.tasks[task.id] = task
        self.counters.enter(task.tenant)
        self.queues[task.model].push(task)
        self.pump(task.model, now)

    def kill(self, task: Task, error: LLMOSError, now: float) -> None:
        """End a task wherever it is."""
        if task.place is not Place.ENDED:
            self.finish(task, None, error, now)
            self.pump(task.model, now)

    def nice(self, task: Task, band: Band, now: float) -> None:
        """Move a task to another band; into realtime only if its deadline can be kept there."""
        before = task.band
        if band == before:
            return
        task.band = band
        try:
            self._promise(task, now)
        except LLMOSError:
            task.band = before
            raise
        if task.place is Place.WAITING:
            task.band = before
            self.queues[task.model].remove(task)
            task.band = band
            self.queues[task.model].push(task)
        elif task.slot >= 0:
            rows = self.hosts[task.arena].rows
            rows.leave(task)
            rows.enter(task)
        self.pump(task.model, now)

    def stop(self, task: Task, now: float) -> None:
        """Take a task from the device or the queue until ``cont``. It keeps its pages while nobody needs
        them; what is in flight for it is dropped, and will be produced again."""
        if task.place is Place.STOPPED:
            return
        host = self.hosts.get(task.arena)
        if task.place is Place.WAITING:
            self.queues[task.model].remove(task, Place.STOPPED)
        elif task.place is Place.HELD:
            self.seating.unhold(task)
        elif host is not None:
            self.seating.leave(host, task)
        task.place = Place.STOPPED
        self._break_promise(task)
        self.pump(task.model, now)

    def cont(self, task: Task, now: float) -> None:
        """Let a stopped task go on, at the front of its tenant's line; a deadline has to be promised anew."""
        if task.place is Place.STOPPED:
            self._promise(task, now)
            self.queues[task.model].push(task, front=True)
            self.pump(task.model, now)

    # --- events: hosts ---

    def add_host(self, host: Host, now: float) -> None:
        """A driver is ready to execute quanta for a model; its pages are empty."""
        self._order.prepare(host)
        host.ready = True
        self.learn(host.model)
        self.hosts[host.arena] = host
        self._rebind(host)
        self.lending.changed(host)
        self.pump(host.model.model, now)

    def learn(self, model: LoadedModel) -> None:
        """A driver has a model, if only parked: tasks for it may wait."""
        self.models[model.model] = model
        self.queues.setdefault(model.model, self._order.queue(self.counters))

    def lose_host(self, host: Host, now: float) -> None:
        """A driver is gone, and all KV with it; its tasks start again from the tokens they have."""
        if self.hosts.pop(host.arena, None) is None:
            return
        self.swapping.lose(host)
        for task in sorted(host.running, key=lambda t: t.arrived, reverse=True):
            self.seating.displace(host, task)
        for task in host.promised.values():
            task.bound = ""
        for other in self.hosts_of(host.model.model)[:1]:
            self._rebind(other)
        for task in host.keepers.values():
            self.paging.strip(task)
        host.keepers.clear()
        self.paging.uncap()
        self.pump(host.model.model, now)

    def forget_host(self, host: Host, now: float) -> None:
        """Memory has taken back the pages of a host that was lost: its neighbours may have them."""
        self.lending.changed(host)
        self.lending.left(host)
        self.lending.wake(now)

    def fail_host(self, host: Host, error: LLMOSError, now: float) -> None:
        """A quantum failed on the device: its tasks end with the error, the others start again."""
        for task in {task for flight in host.flight for task in flight.tasks}:
            self.finish(task, None, IOFailure(f"the driver failed: {error}"), now)
        self.lose_host(host, now)

    # --- events: the driver ---

    def step(self, host: Host, step: Step, now: float) -> None:
        """A step's tokens arrived."""
        produced = host.apply(step, now)
        for item in produced:
            if item.tokens and not item.task.first_token_at:
                item.task.first_token_at = now
            self.counters.charge(item.task, 0, len(item.tokens))
        self._effects.emit([item for item in produced if item.tokens])
        ended = [item for item in produced if item.finished is not None]
        self.paging.publish(host, [item.task for item in ended if item.finished != "error"])
        for item in ended:
            if item.finished == "error":
                self.finish(item.task, None, IOFailure("the device made nonsense of this task"), now)
            else:
                self.finish(item.task, item.finished, None, now)
        if ended and len(self.queues[host.model.model]):
            self.seating.admit(host.model.model, now)
        if ended:
            self.lending.wake(now)
        if host.overdue:
            self.take_back(host)

    def cut(self, host: Host, steps: dict[int, int], now: float) -> None:
        """Quanta were taken back, and end after so many steps: what follows can be sent behind these."""
        host.cut(steps)
        self.run(host, now)

    def done(self, host: Host, done: QuantumDone, now: float) -> None:
        """A quantum ended."""
        flight = next(f for f in host.flight if f.quantum.id == done.quantum)
        host.done(done)
        self.paging.publish(host, flight.tasks)
        self.pump(host.model.model, now)

    # --- what is known ---

    def running_of(self, tenant: str) -> int:
        return sum(host.tenants[tenant] for host in self.hosts.values())

    def waiting_of(self, tenant: str) -> int:
        return sum(queue.waiting[tenant] for queue in self.queues.values())

    def hosts_of(self, model: str) -> list[Host]:
        """The hosts that serve a model."""
        return [host for host in self.hosts.values() if host.model.model == model]

    # --- what follows from the events ---

    def pump(self, model: str, now: float) -> None:
        """Something has changed: seat who can be, and keep the hosts busy."""
        if model in self.queues:
            self.seating.admit(model, now)
            for host in self.hosts_of(model):
                self.run(host, now)
        self.lending.wake(now)

    def run(self, host: Host, now: float) -> None:
        """Keep a quantum queued behind the running one; take the device back for who should not wait."""
        crunch = bool(host.promised) and promises.in_crunch(host, now, self._max_steps)
        hurry, host.crunch = crunch and not host.crunch, crunch
        urgent = [task for task in host.unstarted.values() if task.rank < 2]
        if hurry or urgent:
            self.take_back(host)
        # Who is urgent and waits for its pages comes with the next quantum: it waits a moment for them while
        # the device has work; else this one must not be long.
        coming = [task for task in urgent if task.place is Place.RESERVING]
        held = host.busy and any(host.expects(task) for task in coming)
        self.seating.rest(host)
        steps = 1 if coming else min(self._max_steps, host.tiers.patience)
        while host.can_compose and not held:
            quantum = compose(host, next(self._quanta), steps, now)
            if quantum is None:
                break
            host.sent(quantum)
            self._effects.execute(host, quantum)
        if host.thirsty:
            self.paging.grow(host)

    def take_back(self, host: Host) -> None:
        """Have what was sent end at the next step, if it is more than what is on the device already.

        Between two times a step of the host is done, or on the device: else hosts that share one could take
        back for ever what each has sent before any of it is done. Who comes too soon waits for that step.
        """
        host.overdue = host.stalled and not host.draining
        if host.can_take_back:
            host.draining = host.stalled = True
            self._effects.preempt(host, host.flight[-1].quantum.id)

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None, now: float) -> None:
        """End a task, and give back what it has."""
        host = self.hosts.get(task.arena)
        if task.place is Place.WAITING:
            self.queues[task.model].remove(task)
        elif task.place is Place.HELD:
            self.seating.unhold(task)
        elif host is not None and task.slot >= 0:
            self.seating.leave(host, task)
        # While RESERVING the pages are on their way: ``reserved`` gives them back.
        if task.kept and host is not None:
            self.paging.free(host, task)
        task.place = Place.ENDED
        self._break_promise(task)
        self.counters.leave(task.tenant)
        del self.tasks[task.id]
        self.finished += 1
        self._effects.finish(task, reason, error)

    def _promise(self, task: Task, now: float) -> None:
        """Promise a realtime task its deadline, or raise; a task of another band is promised nothing."""
        self._break_promise(task)
        if self._order.promises and task.rank == 0 and task.deadline and task.model in self.queues:
            hosts = self.seating.placing.ranked(task, self.hosts_of(task.model))
            host = promises.check(hosts, task, now) or (hosts[0] if hosts else None)
            if host is not None:
                host.promised[task.id] = task
                task.bound = host.arena

    def _break_promise(self, task: Task) -> None:
        if (host := self.hosts.get(task.bound)) is not None:
            host.promised.pop(task.id, None)
        task.bound = ""

    def _rebind(self, host: Host) -> None:
        """A host does what it can for promises whose host is gone."""
        for task in self.tasks.values():
            if task.rank == 0 and task.deadline and not task.bound and task.model == host.model.model:
                host.promised[task.id] = task
                task.bound = host.arena

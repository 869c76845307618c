"""Who gets a slot: waiting tasks are seated, less urgent ones give way. No I/O and no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmos.services.scheduler import headroom
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.order import Order
from llmos.services.scheduler.placing import Placing
from llmos.services.scheduler.queue import REALTIME_LOOKAHEAD, Eligible, TaskQueue
from llmos.services.scheduler.rows import INTERACTIVE
from llmos.services.scheduler.task import Place, Swap, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core

AT_ONCE = 32  # tasks that are seated, or found to wait for another, before other events have their turn


class Seating:
    """The core's dealings with the slots of all of its hosts."""

    def __init__(self, core: Core, order: Order, share: float) -> None:
        self._core = core
        self._order = order
        self._share = share
        self.placing = Placing(order.for_slot)
        self.displaced = 0
        self._calm: set[str] | None = None  # who is light, of the model that is looked at
        self._unfinished: set[str] = set()  # models with more to be seated

    # --- asked by the core ---

    def admit(self, model: str, now: float) -> None:
        """Seat waiting tasks while there are slots, or less urgent tasks in them; after so many the rest has
        to wait until memory has answered for one of them, so that no decision takes long."""
        queue, hosts = self._core.queues[model], self._core.hosts_of(model)
        self._unfinished.discard(model)
        passed: set[int] = set()
        self._calm, slots = None, sum(host.model.slots for host in hosts)

        def eligible(task: Task) -> bool:
            return task.id not in passed and self._eligible(task, hosts, slots)

        for _ in range(AT_ONCE if hosts else 0):
            task = self._favoured(hosts, eligible) or queue.peek(now, eligible, any(h.vacant for h in hosts))
            if task is None:
                self._core.lending.relax(hosts)
                return
            place = self.placing.place(task, hosts) or self._from_beyond(task, hosts)
            if place is None:
                if (home := self._core.hosts.get(task.arena)) is not None:
                    self._core.swapping.prefetch(home, task, self._core.paging.extra(home, task))
                # Only a realtime task is bound to a host; the next may be bound to another.
                if task.rank or len(passed) >= REALTIME_LOOKAHEAD:
                    return
                passed.add(task.id)
                continue
            host, victim = place
            if self._order.waits and self._held_back(host, task):
                self._served(queue, task)
                continue
            if victim is not None:
                self.displace(host, victim)
            queue.take(task, now)
            self._seat(host, task, now)
            self._served(queue, task)
        self._unfinished.add(model)

    def go_on(self, model: str, now: float) -> None:
        """Seat those who were left when enough had been seated at once."""
        if model in self._unfinished:
            self.admit(model, now)

    def rest(self, host: Host) -> None:
        """Say who gains nothing in the next quantum for the sake of others."""
        waits = self._core.queues[host.model.model].interactive
        host.resting = headroom.resting(host, self._share, waits) if self._order.shares else set()

    def gives_way(self, host: Host, task: Task) -> Task | None:
        """Who of the same band is beyond its share, for one who is within."""
        return headroom.gives_way(host, task, self._share) if self._order.shares else None

    def displace(self, host: Host, task: Task) -> None:
        """A running task gives up its slot and keeps its pages. What is in flight for it is dropped: its
        randomness is keyed by position, so it will produce the same tokens again."""
        self.leave(host, task)
        self.requeue(task)

    def leave(self, host: Host, task: Task) -> None:
        """Take a task out of its slot; those who waited for its prefix look for themselves."""
        host.leave(task)
        host.tiers.parked.pop(task.id, None)
        if task.pages:
            host.keepers[task.id] = task
        self.release(host.computing.leave(task))

    def requeue(self, task: Task) -> None:
        """A task that had a slot waits for another, first of its tenant."""
        self.displaced += 1
        task.displaced += 1
        self._core.queues[task.model].push(task, front=True)

    def release(self, held: list[Task]) -> None:
        """The prefix that these waited for is there, or will not come."""
        for task in reversed(held):
            if task.place is Place.HELD:
                self._core.queues[task.model].push(task, front=True)

    def unhold(self, task: Task) -> None:
        """A task waits for no prefix any more."""
        if (host := self._core.hosts.get(task.arena)) is not None:
            host.computing.drop(task)

    # --- what follows from them ---

    def _seat(self, host: Host, task: Task, now: float) -> None:
        host.seat(task)
        task.started_at = task.started_at or now
        if task.pages and task.arena == host.arena:
            host.begin(task, task.pages, min(task.computed, len(task.tokens) - 1))
            self._core.run(host, now)
            return
        if task.swap is not Swap.NONE and task.arena == host.arena:
            self._core.paging.reserve(host, task)
            return
        if task.kept:
            self._core.paging.free(self._core.hosts[task.arena], task)
        task.arena = host.arena
        # Charged before it is computed, so that one tenant does not take all slots at the same moment.
        self._core.counters.charge(task, len(task.tokens), 0)
        if task.names:
            self.placing.note(host, task)
            host.computing.begin(task, task.names)
        self._core.paging.reserve(host, task)

    def _favoured(self, hosts: list[Host], eligible: Eligible) -> Task | None:
        """Who waits for a slot only to have what all others lend it: nobody of its model is before it."""
        for host in hosts:
            task = host.favoured
            if task is not None and task.place is Place.WAITING and eligible(task):
                return task
        return None

    def _held_back(self, host: Host, task: Task) -> bool:
        """Whether a task waits for another to compute their common prefix; it leaves the queue meanwhile."""
        if task.kept or not task.names:
            return False
        found = host.computing.leader(task, task.names)
        if found is None:
            return False
        self._core.queues[task.model].remove(task, Place.HELD)
        task.arena = host.arena
        host.computing.hold(task, *found)
        return True

    def _eligible(self, task: Task, hosts: list[Host], slots: int) -> bool:
        if task.swap is Swap.OUT or self._core.paging.at_limit(task):
            return False
        if task.max_running and self._core.running_of(task.tenant) >= task.max_running:
            return False
        return task.rank != INTERACTIVE or not self._order.shares or not self._floods(task, hosts, slots)

    def _from_beyond(self, task: Task, hosts: list[Host]) -> tuple[Host, Task | None] | None:
        """A host on which a tenant within its share finds one that is beyond."""
        for host in hosts:
            if host.short_of_pages or host.yields:
                continue
            if (victim := self.gives_way(host, task)) is not None:
                return host, victim
        return None

    def _floods(self, task: Task, hosts: list[Host], slots: int) -> bool:
        """Whether a tenant has its share of the slots while another is here that asks for little."""
        has = sum([host.rows.count(task.tenant) for host in hosts])
        if has < headroom.most(slots, self._share, task.weight):
            return False
        if self._calm is None:
            self._calm = headroom.light(hosts, self._share, self._core.queues[task.model].interactive)
        return bool(self._calm - {task.tenant})

    def _served(self, queue: TaskQueue, task: Task) -> None:
        """A task has left the queue. Where nobody was light, somebody is only if its tenant has no more."""
        if self._calm or not queue.interactive(task.tenant):
            self._calm = None

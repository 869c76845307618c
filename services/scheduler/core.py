"""What the scheduler does on every event. No I/O and no clock: the server hands in events with the time, and
effects leave through an interface, which a simulator implements as well as the server does.

A task's way: ``submit`` queues it; ``_admit`` seats it in a slot and asks memory for pages; ``reserved``
makes it ready; ``_run`` composes it into a quantum; ``step`` records its tokens; ``_finish`` ends it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Protocol

from llmos.drivers.sdk.messages import LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.errors import IOFailure, LLMOSError, NoMemory
from llmos.ipc.grant import Band
from llmos.services.memory.messages import Transfer
from llmos.services.scheduler import displace, promises
from llmos.services.scheduler.compose import compose
from llmos.services.scheduler.headroom import SHARE, Presence
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.placing import Placing
from llmos.services.scheduler.queue import REALTIME_LOOKAHEAD, Counters, TaskQueue
from llmos.services.scheduler.swapping import SwapEffects, Swapping
from llmos.services.scheduler.task import Place, Swap, Task

AHEAD = 4  # quanta whose pages a task is given ahead of need


class Effects(SwapEffects, Protocol):
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

    def __init__(self, effects: Effects, max_steps: int, share: float = SHARE) -> None:
        self._effects = effects
        self._max_steps = max_steps
        self._quanta = itertools.count(1)
        self._placing = self._new_placing()
        self._capped: set[str] = set()  # tenants whose page quota is used up
        self._presence = Presence()
        self._share = share
        self.counters = Counters()
        self.swapping = Swapping(self, effects)
        self.hosts: dict[str, Host] = {}
        self.queues: dict[str, TaskQueue] = {}
        self.models: dict[str, LoadedModel] = {}
        self.tasks: dict[int, Task] = {}
        self.finished = 0
        self.displaced = 0

    # --- events: tasks ---

    def submit(self, task: Task, now: float) -> None:
        """A task arrived, and was found admissible. A realtime task whose deadline cannot be kept is refused
        by TimedOut or NoMemory with ``earliest``, before any effect."""
        self._promise(task, now)
        task.queued_at = now
        self.tasks[task.id] = task
        self.counters.enter(task.tenant)
        if task.rank == 1:
            self._presence.enter(task.tenant)
        self.queues[task.model].push(task)
        self._pump(task.model, now)

    def kill(self, task: Task, error: LLMOSError, now: float) -> None:
        """End a task wherever it is."""
        if task.place is not Place.ENDED:
            self._finish(task, None, error, now)
            self._pump(task.model, now)

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
        if before == "interactive":
            self._presence.leave(task.tenant, now)
        elif task.rank == 1:
            self._presence.enter(task.tenant)
        if task.place is Place.WAITING:
            task.band = before
            self.queues[task.model].remove(task)
            task.band = band
            self.queues[task.model].push(task)
        self._pump(task.model, now)

    def stop(self, task: Task, now: float) -> None:
        """Take a task from the device or the queue until ``cont``. It keeps its pages while nobody needs
        them; what is in flight for it is dropped, and will be produced again."""
        if task.place is Place.STOPPED:
            return
        host = self.hosts.get(task.arena)
        if task.place is Place.WAITING:
            self.queues[task.model].remove(task, Place.STOPPED)
        elif task.place is Place.HELD:
            self._unhold(task)
        elif host is not None:
            self._leave(host, task)
        task.place = Place.STOPPED
        self._break_promise(task)
        self._pump(task.model, now)

    def cont(self, task: Task, now: float) -> None:
        """Let a stopped task go on, at the front of its tenant's line; a deadline has to be promised anew."""
        if task.place is Place.STOPPED:
            self._promise(task, now)
            self.queues[task.model].push(task, front=True)
            self._pump(task.model, now)

    def running_of(self, tenant: str) -> int:
        return sum(host.tenants[tenant] for host in self.hosts.values())

    def waiting_of(self, tenant: str) -> int:
        return sum(queue.waiting[tenant] for queue in self.queues.values())

    def hosts_of(self, model: str) -> list[Host]:
        """The hosts that serve a model."""
        return self._hosts_of(model)

    # --- events: hosts ---

    def add_host(self, host: Host, now: float) -> None:
        """A driver is ready to execute quanta for a model; its pages are empty."""
        host.ready = True
        self.models[host.model.model] = host.model
        self.hosts[host.arena] = host
        self.queues.setdefault(host.model.model, self._new_queue())
        self._rebind(host)
        self._pump(host.model.model, now)

    def lose_host(self, host: Host, now: float) -> None:
        """A driver is gone, and all KV with it; its tasks start again from the tokens they have."""
        if self.hosts.pop(host.arena, None) is None:
            return
        self.swapping.lose(host)
        for task in sorted(host.running, key=lambda t: t.arrived, reverse=True):
            self._leave(host, task)
            self._requeue(task)
        for task in host.promised.values():
            task.bound = ""
        for other in self._hosts_of(host.model.model)[:1]:
            self._rebind(other)
        for task in host.keepers.values():
            self.strip(task)
        host.keepers.clear()
        self._capped.clear()
        self._pump(host.model.model, now)

    def fail_host(self, host: Host, error: LLMOSError, now: float) -> None:
        """A quantum failed on the device: its tasks end with the error, the others start again."""
        for task in {task for flight in host.flight for task in flight.tasks}:
            self._finish(task, None, IOFailure(f"the driver failed: {error}"), now)
        self.lose_host(host, now)

    # --- events: memory ---

    def reserved(
        self, host: Host, task: Task, pages: list[int], cached: int, now: float,
        transfer: Transfer | None = None, low: bool = False,
    ) -> None:  # fmt: skip
        """Memory gave a seated task its pages; what they hold may have to be transferred first."""
        if task.place is not Place.RESERVING or self.hosts.get(host.arena) is not host:
            self._effects.free(host, [task])
            if transfer is not None:
                self._effects.abort(host, transfer)
            return
        if transfer is not None:
            self.swapping.incoming(host, task, pages, cached, transfer)
        else:
            self.received(host, task, pages, cached)
            self._run(host, now)
        self.swapping.relieve(host, low)

    def received(self, host: Host, task: Task, pages: list[int], cached: int) -> None:
        """A task has its first pages here, with the KV of its ``cached`` first tokens."""
        task.committed, task.shared_pages = len(task.tokens), cached // host.model.page_tokens
        if task.first_cached < 0:
            task.first_cached = cached
        if task.place is Place.RESERVING:
            host.begin(task, pages, cached)
        else:
            task.pages, task.computed = pages, cached
            host.keepers[task.id] = task
        if cached:
            self.counters.refund(task, cached)
            self.queues[task.model].refunded(task.tenant)
        self._release(host.computing.advance(task, cached))

    def refused(self, host: Host, task: Task, now: float, error: NoMemory | None = None) -> None:
        """Memory has no pages for a seated task: wait for those that are leaving, take them from one that is
        less urgent, or queue again."""
        if task.place is not Place.RESERVING or self.hosts.get(host.arena) is not host:
            return
        details = error.details if error is not None else {}
        if details.get("quota"):
            self._refused_by_quota(host, task, now, error)
            return
        needed, lacking = _shortage(details)
        if details.get("demotable"):
            self.swapping.park(host, task, lacking)
            self.swapping.relieve(host, low=True)
            return
        if host.tiers.coming >= lacking:
            self.swapping.park(host, task, lacking)
            return
        victim = self._page_victim(host, task, needed)
        if victim is not None and (victim.slot < 0 or victim.urgency > task.urgency):
            if self._take_pages(host, victim, task):
                self.reserve(host, task)
            else:
                self.swapping.park(host, task, lacking)
            return
        self._leave(host, task)
        self.queues[task.model].push(task, front=True)
        host.short_of_pages = True
        self.swapping.relieve(host, low=True)

    def grown(
        self, host: Host, gets: list[tuple[Task, int, list[int]]], now: float, low: bool = False
    ) -> None:
        """Memory's answer to ``grow``: (task, its residence when asked, pages)."""
        failed, coming = False, host.tiers.coming
        for task, residence, pages in gets:
            if task.residence != residence or task.place is Place.ENDED:
                continue
            task.growing = False
            if pages:
                host.grow(task, pages)
            elif task.place is Place.RUNNING:
                capped, lacking = self._at_quota(host, task), self._lacking(host, task)
                if lacking <= 0:
                    continue
                if not capped and coming >= lacking:
                    coming, failed = coming - lacking, True
                    continue
                victim = self._growth_victim(host, task) or task
                failed = failed or victim.tenant != task.tenant or not task.max_pages
                size = len(victim.pages)
                if not self._take_pages(host, victim, None if capped else task, swap=not capped):
                    coming += size - lacking
        # Nobody new is let in before those who run have what they need: they would take it from each other.
        host.short_of_pages = failed
        self._run(host, now)
        self._admit(host.model.model, now)
        self.swapping.relieve(host, low)

    # --- events: the driver ---

    def step(self, host: Host, step: Step, now: float) -> None:
        """A step's tokens arrived."""
        produced = host.apply(step)
        for item in produced:
            if item.tokens and not item.task.first_token_at:
                item.task.first_token_at = now
            self.counters.charge(item.task, 0, len(item.tokens))
        self._effects.emit([item for item in produced if item.tokens])
        ended = [item for item in produced if item.finished is not None]
        self._publish(host, [item.task for item in ended if item.finished != "error"])
        for item in ended:
            if item.finished == "error":
                self._finish(item.task, None, IOFailure("the device made nonsense of this task"), now)
            else:
                self._finish(item.task, item.finished, None, now)
        if ended and len(self.queues[host.model.model]):
            self._admit(host.model.model, now)

    def done(self, host: Host, done: QuantumDone, now: float) -> None:
        """A quantum ended."""
        flight = next(f for f in host.flight if f.quantum.id == done.quantum)
        host.done(done)
        self._publish(host, flight.tasks)
        self._pump(host.model.model, now)

    # --- the order of service, for who compares it with others ---

    def _new_queue(self) -> TaskQueue:
        return TaskQueue(self.counters)

    def _new_placing(self) -> Placing:
        return Placing()

    # --- what follows from them ---

    def _pump(self, model: str, now: float) -> None:
        if model in self.queues:
            self._admit(model, now)
            for host in self._hosts_of(model):
                self._run(host, now)

    def _hosts_of(self, model: str) -> list[Host]:
        return [host for host in self.hosts.values() if host.model.model == model]

    def _admit(self, model: str, now: float) -> None:
        """Seat waiting tasks while there are slots, or less urgent tasks in them."""
        queue, hosts = self.queues[model], self._hosts_of(model)
        passed: set[int] = set()
        while hosts:
            vacant = any(host.vacant for host in hosts)
            task = queue.peek(now, lambda task: task.id not in passed and self._eligible(task, now), vacant)
            if task is None:
                return
            place = self._placing.place(task, hosts)
            if place is None:
                if (home := self.hosts.get(task.arena)) is not None:
                    self.swapping.prefetch(home, task, self._extra(home, task))
                # Only a realtime task is bound to a host; the next may be bound to another.
                if task.rank or len(passed) >= REALTIME_LOOKAHEAD:
                    return
                passed.add(task.id)
                continue
            host, victim = place
            if self._held_back(host, task):
                continue
            if victim is not None:
                self._displace(host, victim)
            queue.take(task, now)
            self._seat(host, task, now)

    def _seat(self, host: Host, task: Task, now: float) -> None:
        host.seat(task)
        task.started_at = task.started_at or now
        if task.pages and task.arena == host.arena:
            host.begin(task, task.pages, min(task.computed, len(task.tokens) - 1))
            self._run(host, now)
            return
        if task.swap is not Swap.NONE and task.arena == host.arena:
            self.reserve(host, task)
            return
        if task.kept:
            self._free(self.hosts[task.arena], task)
        task.arena = host.arena
        # Charged before it is computed, so that one tenant does not take all slots at the same moment.
        self.counters.charge(task, len(task.tokens), 0)
        self._placing.note(host, task)
        host.computing.begin(task, task.names or [])
        self.reserve(host, task)

    def _held_back(self, host: Host, task: Task) -> bool:
        """Whether a task waits for another to compute their common prefix; it leaves the queue meanwhile."""
        if task.kept or not task.names:
            return False
        found = host.computing.leader(task, task.names)
        if found is None:
            return False
        self.queues[task.model].remove(task, Place.HELD)
        task.arena = host.arena
        host.computing.hold(task, *found)
        return True

    def _release(self, held: list[Task]) -> None:
        for task in reversed(held):
            if task.place is Place.HELD:
                self.queues[task.model].push(task, front=True)

    def _unhold(self, task: Task) -> None:
        if (host := self.hosts.get(task.arena)) is not None:
            host.computing.drop(task)

    def _run(self, host: Host, now: float) -> None:
        """Keep a quantum queued behind the running one; take the device back for who should not wait."""
        crunch = bool(host.promised) and promises.in_crunch(host, now, self._max_steps)
        hurry, host.crunch = crunch and not host.crunch, crunch
        if self._worth_preempting(host, hurry):
            host.draining = True
            self._effects.preempt(host, host.flight[-1].quantum.id)
        # Who is urgent and waits for its pages comes with the next quantum: this one must not be long.
        coming = any(t is not None and t.place is Place.RESERVING and t.rank < 2 for t in host.slots)
        while host.can_compose:
            quantum = compose(host, next(self._quanta), 1 if coming else self._max_steps, now)
            if quantum is None:
                break
            host.sent(quantum)
            self._effects.execute(host, quantum)
        self._grow(host)

    def _worth_preempting(self, host: Host, hurry: bool) -> bool:
        urgent = hurry or any(
            t is not None and t.rank < 2 and t.place in (Place.READY, Place.RESERVING) for t in host.slots
        )
        return urgent and not host.draining and sum(f.quantum.steps - f.received for f in host.flight) > 2

    def _grow(self, host: Host) -> None:
        """Ask ahead for the pages that running tasks will need."""
        wants = []
        for task in host.slots:
            if task is None or task.place is not Place.RUNNING or task.growing:
                continue
            ahead = math.ceil(self._max_steps * max(1.0, task.pace))
            if host.capacity(task) < min(task.limit, task.planned + 2 * ahead):
                wants.append((task, self._lacking(host, task)))
                task.growing = True
        if wants:
            self._effects.grow(host, wants)

    def _lacking(self, host: Host, task: Task) -> int:
        ahead = math.ceil(self._max_steps * max(1.0, task.pace))
        target = min(task.limit, task.planned + AHEAD * ahead)
        return host.pages_for(target) - len(task.pages)

    def reserve(self, host: Host, task: Task) -> None:
        """Ask for a seated task's pages, or for what it has in other tiers."""
        if task.swap is Swap.NONE:
            self._effects.reserve(host, task, self._extra(host, task))
        else:
            self.swapping.fetch(host, task, self._extra(host, task))

    def _extra(self, host: Host, task: Task) -> int:
        """A task with a promise gets all the pages it can need; the others some steps ahead."""
        left = task.limit - len(task.tokens)
        return left if task.id in host.promised else min(left, AHEAD * self._max_steps)

    def _publish(self, host: Host, tasks: list[Task]) -> None:
        """Let others have the pages that these tasks have filled by now."""
        full = [task for task in tasks if self._filled_page(host, task)]
        if full:
            self._effects.commit(host, full)
        for task in full:
            self._release(host.computing.advance(task, task.computed))

    def _filled_page(self, host: Host, task: Task) -> bool:
        pages = task.computed // host.model.page_tokens
        filled, task.shared_pages = pages > task.shared_pages, max(pages, task.shared_pages)
        return filled

    def _page_victim(self, host: Host, task: Task, needed: int = 1) -> Task | None:
        waiting = displace.keeper(host.keepers.values(), task, needed)
        return waiting or displace.for_pages(task, host.running, needed)

    def _growth_victim(self, host: Host, task: Task) -> Task | None:
        """Who pays for a running task's next pages: its own tenant where the quota is what lacks."""
        if self._at_quota(host, task):
            away = [
                t for t in host.tiers.away.values() if t.tenant == task.tenant and t.place is Place.WAITING
            ]
            mine = [t for t in [*host.keepers.values(), *host.running] if t.tenant == task.tenant]
            return away[-1] if away else displace.for_pages(task, mine)
        return self._page_victim(host, task)

    def _at_quota(self, host: Host, task: Task) -> bool:
        return bool(task.max_pages) and self._pages_of(host, task.tenant) >= task.max_pages

    def _pages_of(self, host: Host, tenant: str) -> int:
        """How many different pages a tenant's tasks hold, in all tiers."""
        holders = [t for t in [*host.keepers.values(), *host.running] if t.tenant == tenant]
        away = sum(host.pages_for(t.computed) for t in host.tiers.away.values() if t.tenant == tenant)
        return len({page for task in holders for page in task.pages}) + away

    def _refused_by_quota(self, host: Host, task: Task, now: float, error: LLMOSError | None) -> None:
        """The tenant has all the pages it may have: its own tasks wait for each other, nobody else does."""
        details = error.details if error is not None else {}
        everyone = [*host.keepers.values(), *host.running, *host.tiers.away.values()]
        others = [t for t in everyone if t.tenant == task.tenant and t.kept and t is not task]
        needed, quota = (details.get(key) for key in ("needed", "quota"))
        if not others and isinstance(needed, int) and isinstance(quota, int) and needed <= quota:
            # Whoever had them has ended since; what was on its way for them still counts until it is there.
            if host.tiers.journeys:
                self.swapping.park(host, task, 0)
            else:
                self.reserve(host, task)
            return
        if not others:
            self._finish(task, None, error, now)
        else:
            self._leave(host, task)
            keepers = [t for t in others if t.slot < 0]
            self._capped.add(task.tenant)
            self.queues[task.model].push(task, front=True)
            if keepers:
                self._free(host, keepers[-1])
        self._admit(host.model.model, now)

    def _displace(self, host: Host, task: Task) -> None:
        """A running task gives up its slot and keeps its pages. What is in flight for it is dropped: its
        randomness is keyed by position, so it will produce the same tokens again."""
        self._leave(host, task)
        self._requeue(task)

    def _take_pages(self, host: Host, task: Task, needy: Task | None = None, *, swap: bool = True) -> bool:
        """A task gives up its device pages, and its slot if it has one. Returns whether they are free at
        once; else they are being swapped out for ``needy``. What was committed stays as prefix cache."""
        if task.slot >= 0:
            self._displace(host, task)
        if swap and task.pages and self.swapping.out(host, task, needy):
            return False
        self._free(host, task)
        return True

    def _leave(self, host: Host, task: Task) -> None:
        """Take a task out of its slot; those who waited for its prefix look for themselves."""
        host.leave(task)
        host.tiers.parked.pop(task.id, None)
        if task.pages:
            host.keepers[task.id] = task
        self._release(host.computing.leave(task))

    def _requeue(self, task: Task) -> None:
        self.displaced += 1
        task.displaced += 1
        self.queues[task.model].push(task, front=True)

    def _free(self, host: Host, task: Task) -> None:
        """Give a task's pages back; what it is still given on an older request is not for it any more."""
        self.give_up(host, task)
        host.keepers.pop(task.id, None)
        host.short_of_pages = False

    def give_up(self, host: Host, task: Task) -> None:
        """Memory takes back what a task has in any tier."""
        self._effects.free(host, [task])
        self.swapping.forget(host, task)
        self.strip(task)
        self._capped.discard(task.tenant)

    def strip(self, task: Task) -> None:
        """A task has nothing any more; what it is still given on an older request is not for it."""
        task.pages, task.computed, task.growing = [], 0, False
        task.residence += 1

    def commit(self, host: Host, tasks: list[Task]) -> None:
        """Tell memory what was computed."""
        self._effects.commit(host, tasks)

    def pump(self, model: str, now: float) -> None:
        """Something has become free: see who can have it."""
        self._capped.clear()
        self._pump(model, now)

    def _eligible(self, task: Task, now: float) -> bool:
        if (task.tenant in self._capped and not task.kept) or task.swap is Swap.OUT:
            return False
        if task.max_running and self.running_of(task.tenant) >= task.max_running:
            return False
        return task.rank != 1 or not self._floods(task, now)

    def _floods(self, task: Task, now: float) -> bool:
        """Whether a tenant has its share of the slots while another is here that asks for little."""
        hosts = self._hosts_of(task.model)
        most = max(1, int(self._share * task.weight * sum(host.model.slots for host in hosts)))
        if sum(host.tenants[task.tenant] for host in hosts) < most:
            return False
        held = sum(t.rank == 1 and t.tenant == task.tenant for host in hosts for t in host.running)
        return held >= most and self._presence.light(task.tenant, self.queues[task.model].interactive, now)

    def _promise(self, task: Task, now: float) -> None:
        """Promise a realtime task its deadline, or raise; a task of another band is promised nothing."""
        self._break_promise(task)
        if task.rank == 0 and task.deadline and task.model in self.queues:
            hosts = self._placing.ranked(task, self._hosts_of(task.model))
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

    def _finish(self, task: Task, reason: Reason | None, error: LLMOSError | None, now: float) -> None:
        host = self.hosts.get(task.arena)
        if task.place is Place.WAITING:
            self.queues[task.model].remove(task)
        elif task.place is Place.HELD:
            self._unhold(task)
        elif host is not None and task.slot >= 0:
            self._leave(host, task)
        # While RESERVING the pages are on their way: ``reserved`` gives them back.
        if task.kept and host is not None:
            self._free(host, task)
        task.place = Place.ENDED
        self._break_promise(task)
        self.counters.leave(task.tenant)
        if task.rank == 1:
            self._presence.leave(task.tenant, now)
        del self.tasks[task.id]
        self.finished += 1
        self._effects.finish(task, reason, error)


def _shortage(details: dict[str, Any]) -> tuple[int, int]:
    """What a refusal says: pages needed, and how many of them are not to be had."""
    needed, free, evictable = (details.get(key) for key in ("needed", "free", "evictable"))
    if not isinstance(needed, int):
        return 1, 1
    had = sum(count for count in (free, evictable) if isinstance(count, int))
    return needed, max(1, needed - had)

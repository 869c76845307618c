"""What the core does with pages beside the device: displaced tasks are swapped out and fetched ahead of
their turn, cold cache is demoted, prefix hits are fetched. No I/O and no clock.

A task's ``swap`` says where its pages are: OUT on their way from the device, AWAY, IN on their way back. It
may be queued or stopped meanwhile, and seated unless it is OUT; who is seated starts when its pages have
come. Whatever fails, a task falls back on computing its tokens again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llmos.ipc.errors import Busy, LLMOSError, NoMemory
from llmos.services.memory.messages import Costs, Transfer
from llmos.services.scheduler import displace
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Place, Swap, Task
from llmos.services.scheduler.tiers import Journey, Kind, swap_pays

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core

SPARE = 2  # pages for each seated task that stay free when a task is fetched ahead of its turn


class SwapEffects(Protocol):
    """What is asked for; each answer comes back as one event of ``Swapping``."""

    def swap_out(self, host: Host, task: Task) -> None: ...
    def swap_in(self, host: Host, task: Task, extra: int, spare: int) -> None: ...
    def demote(self, host: Host) -> None: ...
    def transfer(self, host: Host, transfer: Transfer) -> None: ...
    def abort(self, host: Host, transfer: Transfer) -> None: ...
    def teach(self, host: Host, costs: Costs) -> None: ...


class Swapping:
    """The core's dealings with the tiers of all of its hosts."""

    def __init__(self, core: Core, effects: SwapEffects) -> None:
        self._core = core
        self._effects = effects
        self.swapped = 0

    # --- asked by the core ---

    def out(self, host: Host, task: Task, needy: Task | None) -> bool:
        """Swap out a task that has no slot, if that is better than computing its tokens again."""
        # In realtime it is a deadline that cannot wait.
        rank = 2 if needy is None else needy.rank if needy.deadline else max(1, needy.rank)
        if not swap_pays(host.tiers, host.times, task, rank):
            return False
        self._core.paging.commit(host, [task])
        tiers = host.tiers
        host.keepers.pop(task.id, None)
        tiers.fetched.discard(task.id)
        tiers.away[task.id] = task
        tiers.leaving[task.id] = len(task.pages)
        task.swap = Swap.OUT
        task.pages, task.growing = [], False
        task.residence += 1  # what it is still given on an older request goes with the rest
        self.swapped += 1
        self._effects.swap_out(host, task)
        return True

    def fetch(self, host: Host, task: Task, extra: int) -> None:
        """A task whose pages are not on the device was seated."""
        if task.swap is Swap.AWAY:
            task.swap = Swap.IN
            self._effects.swap_in(host, task, extra, 0)

    def prefetch(self, host: Host, task: Task, extra: int) -> None:
        """A task is next and has no slot yet: its pages may come meanwhile."""
        if task.swap is Swap.AWAY and task.arena == host.arena and not host.tiers.parked:
            task.swap = Swap.IN
            self._effects.swap_in(host, task, extra, SPARE * host.seated)

    def forget(self, host: Host, task: Task) -> None:
        """A task gives up what it has in any tier, or has it on the device again."""
        task.swap = Swap.NONE
        host.tiers.hasty.discard(task.id)
        for table in (host.tiers.away, host.tiers.parked, host.tiers.leaving):
            table.pop(task.id, None)
        host.tiers.fetched.discard(task.id)

    def lose(self, host: Host) -> None:
        """All pages of a host are gone, in every tier."""
        for task in list(host.tiers.away.values()):
            self.forget(host, task)
            self._core.paging.strip(task)
        host.tiers.journeys.clear()

    def park(self, host: Host, task: Task, lacking: int) -> None:
        """A seated task waits until pages that are leaving are free."""
        host.tiers.parked[task.id] = task, max(1, lacking)

    def incoming(self, host: Host, task: Task, pages: list[int], cached: int, transfer: Transfer) -> None:
        """A new task's prefix has to be fetched first."""
        task.swap = Swap.IN
        host.tiers.away[task.id] = task
        self._begin(host, transfer, Journey(Kind.HIT, task, task.residence, pages, cached))

    def abort(self, host: Host, transfer: Transfer) -> None:
        """Nobody waits for a transfer that was not begun."""
        self._effects.abort(host, transfer)

    def relieve(self, host: Host, low: bool) -> None:
        """Few pages are free: move cold ones away ahead of need."""
        if low and host.tiers.exist and not host.tiers.demoting:
            host.tiers.demoting = True
            self._effects.demote(host)

    def teach(self, host: Host) -> None:
        """Tell memory what things cost, if that has changed."""
        if host.tiers.exist and (costs := host.tiers.lesson(host.arena, host.times)) is not None:
            self._effects.teach(host, costs)

    # --- events ---

    def going(self, host: Host, task: Task, residence: int, transfer: Transfer) -> None:
        """Memory's answer to ``swap_out``."""
        if not self._is(host, task, residence, Swap.OUT):
            self._effects.abort(host, transfer)
            return
        self._begin(host, transfer, Journey(Kind.OUT, task, residence))

    def stays(self, host: Host, task: Task, residence: int, error: LLMOSError, now: float) -> None:
        """Memory could not swap a task out: it is full, or gone."""
        if not self._is(host, task, residence, Swap.OUT):
            return
        self._recompute(host, task)
        self._core.lending.left(host)
        self._go_on(host, now)

    def coming(
        self, host: Host, task: Task, residence: int, pages: list[int], cached: int,
        transfer: Transfer | None, now: float,
    ) -> None:  # fmt: skip
        """Memory's answer to ``swap_in``."""
        if not self._is(host, task, residence, Swap.IN):
            if transfer is not None:
                self._effects.abort(host, transfer)
            return
        journey = Journey(Kind.IN, task, residence, pages, cached)
        if transfer is not None:
            self._begin(host, transfer, journey)
        else:
            self._arrive(host, journey, now)
            self._go_on(host, now)

    def must_wait(self, host: Host, task: Task, residence: int, error: LLMOSError, now: float) -> None:
        """Memory did not bring a task in: no pages, or some of its own are still on their way."""
        if not self._is(host, task, residence, Swap.IN):
            return
        task.swap = Swap.AWAY
        if task.place is not Place.RESERVING:
            return
        if isinstance(error, NoMemory):
            self._core.paging.refused(host, task, now, error)
        elif isinstance(error, Busy) and host.tiers.journeys:
            self.park(host, task, 0)
        else:
            self._recompute(host, task)

    def demotion(self, host: Host, transfer: Transfer, now: float) -> None:
        """Memory's answer to ``demote``: what to move; else a task that waits makes room."""
        if self._core.hosts.get(host.arena) is not host:
            self._effects.abort(host, transfer)
        elif transfer.batches:
            leaving = sum(len(batch.pages) for batch in transfer.batches if batch.source == "device")
            host.tiers.leaving[-transfer.id] = leaving
            self._begin(host, transfer, Journey(Kind.DEMOTE))
        else:
            host.tiers.demoting = False
            if host.tiers.parked:
                host.tiers.hasty |= host.tiers.parked.keys()
                self._go_on(host, now)
            waiting = [t for t in host.keepers.values() if t.id not in host.tiers.fetched]
            victim = max(waiting, key=displace.expendable, default=None)
            if victim is not None and not host.tiers.leaving:
                self.out(host, victim, None)

    def settled(self, host: Host, transfer: int, complete: bool, cached: int, low: bool, now: float) -> None:
        """A transfer is over, and memory knows."""
        journey = host.tiers.journeys.pop(transfer, None)
        host.tiers.stale.discard(transfer)
        if journey is None or self._core.hosts.get(host.arena) is not host:
            return
        task = journey.task
        if journey.kind is Kind.DEMOTE:
            host.tiers.demoting = False
            host.tiers.leaving.pop(-transfer, None)
        elif task is not None and journey.valid:
            if not complete:
                self._recompute(host, task)
            elif journey.kind is Kind.OUT:
                self._left(host, task, cached)
            else:
                self._arrive(host, journey, now)
        self.teach(host)
        if journey.kind in (Kind.OUT, Kind.DEMOTE):
            self._core.lending.left(host)
        self._go_on(host, now)
        self.relieve(host, low)

    def memory_lost(self, host: Host) -> list[Task]:
        """Memory was started anew and knows nothing of other tiers. What was coming goes on coming into
        pages that memory is told of; what is away or was leaving is computed again. Returns the seated
        tasks that have to ask for pages, once memory knows the rest."""
        host.tiers.demoting, host.tiers.taught = False, None
        host.tiers.leaving.clear()
        host.tiers.stale |= host.tiers.journeys.keys()  # the new memory does not know which blocks they use
        coming = {journey.task for journey in host.tiers.journeys.values()}
        again = []
        for task in list(host.tiers.away.values()):
            if task.swap in (Swap.OUT, Swap.AWAY) or task not in coming:
                self.forget(host, task)
                self._core.paging.strip(task)
                again += [task] if task.place is Place.RESERVING else []
        return again

    def pages_on_their_way(self, host: Host) -> list[tuple[Task, list[int]]]:
        """Pages into which a transfer may be writing, and the tasks they are for."""
        return [
            (j.task, j.pages)
            for j in host.tiers.journeys.values()
            if j.task is not None and j.valid and j.pages
        ]

    # --- what follows from them ---

    def _begin(self, host: Host, transfer: Transfer, journey: Journey) -> None:
        host.tiers.journeys[transfer.id] = journey
        # Pages are copied between quanta: whoever waits for them does not wait for long ones.
        self._core.take_back(host)
        self._effects.transfer(host, transfer)

    def _is(self, host: Host, task: Task, residence: int, swap: Swap) -> bool:
        current = self._core.hosts.get(host.arena) is host
        return current and task.residence == residence and task.swap is swap

    def _left(self, host: Host, task: Task, cached: int) -> None:
        """A task's device pages are free."""
        host.tiers.leaving.pop(task.id, None)
        task.swap, task.computed = Swap.AWAY, cached

    def _arrive(self, host: Host, journey: Journey, now: float) -> None:
        """A task's pages are on the device."""
        task = journey.task
        assert task is not None
        self.forget(host, task)
        if journey.kind is Kind.HIT:
            self._core.paging.received(host, task, journey.pages, journey.cached)
            return
        task.pages, task.housed_at = journey.pages, now
        self._core.lending.received(host, task)
        if task.place is Place.RESERVING:
            host.begin(task, journey.pages, min(journey.cached, len(task.tokens) - 1))
            return
        task.computed = journey.cached
        host.keepers[task.id] = task
        host.tiers.fetched.add(task.id)

    def _recompute(self, host: Host, task: Task) -> None:
        """A task gives up all it has, and starts again from its tokens."""
        self._core.paging.give_up(host, task)
        if task.place is Place.RESERVING:
            self._core.paging.reserve(host, task)

    def _go_on(self, host: Host, now: float) -> None:
        """Pages may be free now: for those who wait seated, for those who run, for those who queue."""
        parked = [task for task, _ in host.tiers.parked.values()]
        host.tiers.parked.clear()
        for task in parked:
            if task.place is Place.RESERVING:
                self._core.paging.reserve(host, task)
        host.short_of_pages = False
        self._core.paging.uncap()
        self._core.pump(host.model.model, now)

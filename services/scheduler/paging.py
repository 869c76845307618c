"""The pages of tasks: asked for, grown, shared, taken from one for another. No I/O and no clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from llmos.ipc.errors import LLMOSError, NoMemory
from llmos.services.memory.messages import Transfer
from llmos.services.scheduler import displace, lasting
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.lasting import Room
from llmos.services.scheduler.lending import Claim, Debts
from llmos.services.scheduler.order import Order
from llmos.services.scheduler.task import Place, Swap, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core

NOTHING_OWED = Debts()
AHEAD = 4  # quanta whose pages a task is given ahead of need


class PageEffects(Protocol):
    """What is asked of memory; answers to ``reserve`` and ``grow`` come back as events of ``Paging``. After
    ``seconds`` ``Lending.wake`` is to be called."""

    def reserve(self, host: Host, task: Task, extra: int, room: Room) -> None: ...
    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None: ...
    def free(self, host: Host, tasks: list[Task]) -> None: ...
    def commit(self, host: Host, tasks: list[Task]) -> None: ...
    def wake(self, seconds: float) -> None: ...


class Paging:
    """The core's dealings with the pages of all of its hosts."""

    def __init__(self, core: Core, effects: PageEffects, order: Order, max_steps: int) -> None:
        self._core = core
        self._effects = effects
        self._order = order
        self._max_steps = max_steps
        self._capped: set[str] = set()  # tenants whose page quota is used up

    # --- events ---

    def reserved(
        self, host: Host, task: Task, pages: list[int], cached: int, now: float,
        transfer: Transfer | None = None, low: bool = False,
    ) -> None:  # fmt: skip
        """Memory gave a seated task its pages; what they hold may have to be transferred first."""
        swapping = self._core.swapping
        if task.place is not Place.RESERVING or self._core.hosts.get(host.arena) is not host:
            self._effects.free(host, [task])
            if transfer is not None:
                swapping.abort(host, transfer)
            # Who was refused pages meanwhile may have these.
            host.short_of_pages = False
            self._core.lending.gave(host)
            self._core.pump(host.model.model, now)
            return
        task.housed_at = now
        if transfer is not None:
            swapping.incoming(host, task, pages, cached, transfer)
        else:
            self.received(host, task, pages, cached)
        self._core.run(host, now)
        self._core.seating.go_on(host.model.model, now)
        swapping.relieve(host, low)

    def received(self, host: Host, task: Task, pages: list[int], cached: int) -> None:
        """A task has its first pages here, with the KV of its ``cached`` first tokens."""
        task.committed, task.shared_pages = len(task.tokens), cached // host.model.page_tokens
        task.pages = pages
        self._core.lending.received(host, task)
        if task.first_cached < 0:
            task.first_cached = cached
        if task.place is Place.RESERVING:
            host.begin(task, pages, cached)
        else:
            task.computed = cached
            host.keepers[task.id] = task
        if cached:
            self._core.counters.refund(task, cached)
            self._core.queues[task.model].refunded(task.tenant)
        self._core.seating.release(host.computing.advance(task, cached))

    def refused(self, host: Host, task: Task, now: float, error: NoMemory | None = None) -> None:
        """Memory has no pages for a seated task: wait for those that are leaving, take them from one that is
        less urgent, or queue again."""
        if task.place is not Place.RESERVING or self._core.hosts.get(host.arena) is not host:
            return
        details = error.details if error is not None else {}
        if details.get("quota"):
            self._refused_by_quota(host, task, now, error)
            return
        swapping = self._core.swapping
        needed, lacking = _shortage(details)
        kept = details.get("kept")
        more = needed + (kept if isinstance(kept, int) else 0)
        if details.get("spare"):
            self._wait(host, task)
            return
        self._core.lending.tighten(host)
        if details.get("demotable"):
            swapping.park(host, task, lacking)
            swapping.relieve(host, low=True)
            return
        if host.tiers.coming >= lacking:
            swapping.park(host, task, lacking)
            return
        victim = self._order.for_pages(host, task, needed)
        if (victim is None or victim.slot >= 0) and self._borrow(
            host, task, Debts.of(details), lacking, more, now
        ):
            return
        if victim is None or (victim.slot >= 0 and not self._enough(host, task, Debts.of(details), lacking)):
            victim = self._core.seating.gives_way(host, task)
        if victim is not None:
            if self.take(host, victim, task):
                self.reserve(host, task)
            else:
                swapping.park(host, task, lacking)
            return
        self._wait(host, task)
        swapping.relieve(host, low=True)

    def _enough(self, host: Host, task: Task, debts: Debts, lacking: int) -> bool:
        """Whether the less urgent who run here, and other models, have what a task lacks: else nobody gives
        way in vain."""
        lower = [t for t in host.running if t.urgency > task.urgency and t is not host.favoured]
        own = len({page for t in lower for page in t.pages})
        return bool(own) and own + host.model.slab_pages * debts.owed >= lacking

    def _wait(self, host: Host, task: Task) -> None:
        """A seated task waits in the queue until there are pages."""
        self._core.seating.leave(host, task)
        self._core.queues[task.model].push(task, front=True)
        self._core.lending.lacks(host, task, host.pages_for(len(task.tokens) + self.extra(host, task)))
        host.short_of_pages = True

    def grown(
        self, host: Host, gets: list[tuple[Task, int, list[int]]], now: float, low: bool = False,
        debts: Debts = NOTHING_OWED,
    ) -> None:  # fmt: skip
        """Memory's answer to ``grow``: (task, its residence when asked, pages)."""
        failed, coming, claimed = False, host.tiers.coming, False
        host.thirsty = True
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
                if victim.slot >= 0 and not capped:
                    claim = self._core.lending.claim
                    claimed = claimed or claim(host, task, debts, lacking, lacking, now) is not Claim.NOBODY
                    if claimed:
                        failed = True
                        continue
                failed = failed or victim.tenant != task.tenant or not task.max_pages
                size = len(victim.pages)
                if not capped:
                    self._core.lending.tighten(host)
                if not self.take(host, victim, None if capped else task, swap=not capped):
                    coming += size - lacking
        # Nobody new is let in before those who run have what they need: they would take it from each other.
        host.short_of_pages = failed
        self._core.run(host, now)
        self._core.seating.admit(host.model.model, now)
        self._core.swapping.relieve(host, low)

    # --- asked by the core ---

    def reserve(self, host: Host, task: Task) -> None:
        """Ask for a seated task's pages, or for what it has in other tiers."""
        self._core.lending.asks(host, task)
        extra = self.extra(host, task)
        if task.swap is Swap.NONE:
            self._effects.reserve(host, task, extra, self._room(host, task, extra))
        else:
            self._core.swapping.fetch(host, task, extra)

    def extra(self, host: Host, task: Task) -> int:
        """A task with a promise gets all the pages it can need, and so does who is lent them by all others;
        the rest some steps ahead."""
        left = task.limit - len(task.tokens)
        whole = task.id in host.promised or self._core.lending.due(host, task)
        return left if whole else min(left, AHEAD * self._max_steps)

    def _room(self, host: Host, task: Task, extra: int) -> Room:
        """What has to be free for a task to last; who was promised or is lent pages lasts anyway."""
        if not host.tight or task.id in host.promised or self._core.lending.due(host, task):
            return Room()
        return lasting.room(host, self._core.lending.neighbours(host), task, extra)

    def grow(self, host: Host) -> None:
        """Ask ahead for the pages that running tasks will need."""
        wants = []
        host.thirsty = False
        size = host.model.page_tokens
        for task in host.slots:
            if task is None or task.growing or task.place is not Place.RUNNING:
                continue
            has = len(task.pages) * size
            if has < task.limit and has < task.planned + 2 * self._ahead(task):
                wants.append((task, self._lacking(host, task)))
                task.growing = True
        if wants:
            self._effects.grow(host, wants)

    def publish(self, host: Host, tasks: list[Task]) -> None:
        """Let others have the pages that these tasks have filled by now."""
        full = [task for task in tasks if _filled_page(host, task)]
        if full:
            self._effects.commit(host, full)
        for task in full:
            self._core.seating.release(host.computing.advance(task, task.computed))

    def commit(self, host: Host, tasks: list[Task]) -> None:
        """Tell memory what was computed."""
        self._effects.commit(host, tasks)

    def free(self, host: Host, task: Task) -> None:
        """Give a task's pages back; what it is still given on an older request is not for it any more."""
        self.give_up(host, task)
        host.keepers.pop(task.id, None)
        host.short_of_pages = False

    def give_up(self, host: Host, task: Task) -> None:
        """Memory takes back what a task has in any tier."""
        self._effects.free(host, [task])
        self._core.swapping.forget(host, task)
        self.strip(task)
        self._capped.discard(task.tenant)
        self._core.lending.gave(host)

    def strip(self, task: Task) -> None:
        """A task has nothing any more; what it is still given on an older request is not for it."""
        task.pages, task.computed, task.growing = [], 0, False
        task.residence += 1

    def at_limit(self, task: Task) -> bool:
        """Whether a task would need new pages, and its tenant gets none."""
        return task.tenant in self._capped and not task.kept

    def uncap(self) -> None:
        """Pages were given back: every tenant may ask again."""
        self._capped.clear()

    # --- what follows from them ---

    def _ahead(self, task: Task) -> int:
        """Tokens that a task may gain in a quantum."""
        return self._max_steps if task.pace <= 1.0 else math.ceil(self._max_steps * task.pace)

    def _lacking(self, host: Host, task: Task) -> int:
        target = min(task.limit, task.planned + AHEAD * self._ahead(task))
        return host.pages_for(target) - len(task.pages)

    def _growth_victim(self, host: Host, task: Task) -> Task | None:
        """Who pays for a running task's next pages: its own tenant where the quota is what lacks."""
        if self._at_quota(host, task):
            away = [
                t for t in host.tiers.away.values() if t.tenant == task.tenant and t.place is Place.WAITING
            ]
            mine = [t for t in [*host.keepers.values(), *host.running] if t.tenant == task.tenant]
            return away[-1] if away else displace.for_pages(task, mine)
        return self._order.for_pages(host, task, 1)

    def _at_quota(self, host: Host, task: Task) -> bool:
        return bool(task.max_pages) and _pages_of(host, task.tenant) >= task.max_pages

    def _refused_by_quota(self, host: Host, task: Task, now: float, error: LLMOSError | None) -> None:
        """The tenant has all the pages it may have: its own tasks wait for each other, nobody else does."""
        details = error.details if error is not None else {}
        everyone = [*host.keepers.values(), *host.running, *host.tiers.away.values()]
        others = [t for t in everyone if t.tenant == task.tenant and t.kept and t is not task]
        needed, quota = (details.get(key) for key in ("needed", "quota"))
        if not others and isinstance(needed, int) and isinstance(quota, int) and needed <= quota:
            # Whoever had them has ended since; what was on its way for them still counts until it is there.
            if host.tiers.journeys:
                self._core.swapping.park(host, task, 0)
            else:
                self.reserve(host, task)
            return
        if not others:
            self._core.finish(task, None, error, now)
        else:
            self._core.seating.leave(host, task)
            keepers = [t for t in others if t.slot < 0]
            self._capped.add(task.tenant)
            self._core.queues[task.model].push(task, front=True)
            if keepers:
                self.free(host, keepers[-1])
        self._core.seating.admit(host.model.model, now)

    def _borrow(self, host: Host, task: Task, debts: Debts, lacking: int, more: int, now: float) -> bool:
        """Whether a seated task gets pages from another model, or got them while it was told that it could
        not: it asks again, now or when they have left."""
        lending = self._core.lending
        claim = lending.claim(host, task, debts, lacking, more, now)
        if claim is Claim.COMING:
            self._core.swapping.park(host, task, lacking)
        elif claim is Claim.FREED or not lending.asked_in_vain(host, task):
            self.reserve(host, task)
        else:
            return False
        return True

    def take(self, host: Host, task: Task, needy: Task | None = None, *, swap: bool = True) -> bool:
        """A task gives up its device pages, and its slot if it has one. Returns whether they are free at
        once; else they are being swapped out for ``needy``. What was committed stays as prefix cache."""
        if task.slot >= 0:
            self._core.seating.displace(host, task)
        if swap and task.pages and self._core.swapping.out(host, task, needy):
            return False
        self.free(host, task)
        return True


def _filled_page(host: Host, task: Task) -> bool:
    pages = task.computed // host.model.page_tokens
    filled, task.shared_pages = pages > task.shared_pages, max(pages, task.shared_pages)
    return filled


def _pages_of(host: Host, tenant: str) -> int:
    """How many different pages a tenant's tasks hold, in all tiers."""
    holders = [t for t in [*host.keepers.values(), *host.running] if t.tenant == tenant]
    away = sum(host.pages_for(t.computed) for t in host.tiers.away.values() if t.tenant == tenant)
    return len({page for task in holders for page in task.pages}) + away


def _shortage(details: dict[str, Any]) -> tuple[int, int]:
    """What a refusal says: pages needed, and how many of them are not to be had."""
    needed, free, evictable = (details.get(key) for key in ("needed", "free", "evictable"))
    if not isinstance(needed, int):
        return 1, 1
    had = sum(count for count in (free, evictable) if isinstance(count, int))
    return needed, max(1, needed - had)

"""One model on one driver: who is in which slot, which quanta are in flight, and what they produced. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf

from llmos.drivers.sdk.messages import FinishReason, LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.flight import InFlight
from llmos.services.scheduler.prefixes import Computing
from llmos.services.scheduler.rows import Rows
from llmos.services.scheduler.steptime import StepTimes
from llmos.services.scheduler.task import Place, Swap, Task
from llmos.services.scheduler.tiers import HostTiers

QUANTA_IN_FLIGHT = 2
STEPS_ON_DEVICE = 2  # at most: they cannot be taken back


def arena_name(driver: str, model: str, replica: int = 0) -> str:
    """The name of the KV pages of a replica; the first is called as if it were the only one."""
    return f"{driver}/{model}#{replica}" if replica else f"{driver}/{model}"


@dataclass(slots=True)
class Produced:
    """What a step gave one task."""

    task: Task
    tokens: list[int]
    finished: FinishReason | None


@dataclass(eq=False)
class Host:
    """The scheduler's picture of a batch: one replica's of a driver; changed by composing and by results,
    never by I/O.

    ``promised`` are the tasks whose deadlines it has to keep; ``crunch`` says that lower bands hold still for
    them, ``solo`` that they did in the last quantum, for a start; ``started`` when each band last started a
    task; ``decoded`` when a quantum was last composed that left nobody out for prompts; ``resting`` are the
    ids of tasks that hold still for the sake of other tenants; ``keepers`` have pages here and no slot;
    ``tenants`` counts the slots of each, ``rows`` those of the interactive band, ``unstarted`` who has a slot
    and is in no quantum yet; ``thirsty`` says that someone who runs may need pages that nobody asked for.
    ``sharers`` are the models in its pool, of which none waits for its share if it ``may_borrow``; if it
    ``yields``, one waits for more than that, or for its share. ``favoured`` is who is lent more than the
    share. It is ``tight`` from when pages were refused until nobody waits.

    It is ``draining`` while it is not known how far the quanta came that were taken back, and ``stalled``
    until a step is done after that, or known to be on the device; if they should be taken back once more
    before that, it is ``overdue``.
    """

    driver: str
    model: LoadedModel
    replica: int = 0
    ready: bool = False
    sharers: int = 1
    may_borrow: bool = True
    yields: bool = False
    favoured: Task | None = None
    tight: bool = False
    slots: list[Task | None] = field(default_factory=list)
    starting: list[Task] = field(default_factory=list)
    releasing: list[int] = field(default_factory=list)
    growth: dict[int, list[int]] = field(default_factory=dict)
    flight: deque[InFlight] = field(default_factory=deque)
    draining: bool = False
    stalled: bool = False
    overdue: bool = False
    short_of_pages: bool = False
    steps: int = 0
    tokens: int = 0
    step_micros: float = 0.0
    times: StepTimes = field(default_factory=StepTimes)
    promised: dict[int, Task] = field(default_factory=dict)
    crunch: bool = False
    solo: bool = False
    started: list[float] = field(default_factory=lambda: [-inf] * len(BANDS))
    decoded: float = -inf
    resting: set[int] = field(default_factory=set)
    keepers: dict[int, Task] = field(default_factory=dict)
    tenants: Counter[str] = field(default_factory=Counter)
    rows: Rows = field(default_factory=Rows)
    unstarted: dict[int, Task] = field(default_factory=dict)
    thirsty: bool = False
    arena: str = field(init=False)  # the name of its KV pages at memory
    computing: Computing = field(init=False)
    tiers: HostTiers = field(init=False)
    _vacant: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.arena = arena_name(self.driver, self.model.model, self.replica)
        self.slots = [None] * self.model.slots
        self._vacant = list(range(self.model.slots))
        self.computing = Computing(self.model.page_tokens)
        self.tiers = HostTiers(self.model)

    @property
    def pool(self) -> str:
        """The name of the pool of pages that it shares with other models, at memory; empty if with none."""
        return arena_name(self.driver, self.model.pool, self.replica) if self.model.pool else ""

    @property
    def guaranteed(self) -> int:
        """Pages that it can have whatever others do."""
        model = self.model
        return model.slabs // self.sharers * model.slab_pages if model.pool else model.pages

    @property
    def running(self) -> list[Task]:
        return [task for task in self.slots if task is not None]

    @property
    def can_compose(self) -> bool:
        return self.ready and not self.draining and self._under_way < QUANTA_IN_FLIGHT

    @property
    def can_take_back(self) -> bool:
        """Whether what was sent is more than what is on the device already, and may be taken back now."""
        if self.draining or self.stalled or not self.flight or self.flight[-1].final:
            return False
        return sum(flight.to_come for flight in self.flight) > STEPS_ON_DEVICE

    @property
    def busy(self) -> bool:
        """Whether steps are to come of what was sent."""
        return self._under_way > 0

    @property
    def _under_way(self) -> int:
        return sum(flight.to_come > 0 for flight in self.flight)

    def expects(self, task: Task) -> bool:
        """Whether a task that came after the last quantum was sent may have its pages in a moment: memory was
        asked, and nothing has to be moved."""
        asked = task.place is Place.RESERVING and task.swap is Swap.NONE and task.id not in self.tiers.parked
        return asked and not (self.flight and self.flight[-1].seats.get(task.slot) == (task, task.stay))

    def capacity(self, task: Task) -> int:
        """How many tokens fit in a task's pages."""
        return len(task.pages) * self.model.page_tokens

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.model.page_tokens)

    @property
    def vacant(self) -> int:
        """How many slots nobody has."""
        return len(self._vacant)

    @property
    def seated(self) -> int:
        return len(self.slots) - len(self._vacant)

    def seat(self, task: Task) -> None:
        """Give a task the first empty slot; it starts with the next quantum once it is READY."""
        task.slot = heapq.heappop(self._vacant)
        self.slots[task.slot] = task
        self.tenants[task.tenant] += 1
        self.rows.enter(task)
        self.unstarted[task.id] = task
        self.keepers.pop(task.id, None)

    def leave(self, task: Task) -> None:
        """Take a task out of its slot; the next quantum empties it on the device, if it ever got there."""
        slot, task.slot = task.slot, -1
        task.stay += 1
        task.promoted = False
        self.slots[slot] = None
        heapq.heappush(self._vacant, slot)
        self.tenants[task.tenant] -= 1
        if not self.tenants[task.tenant]:
            del self.tenants[task.tenant]
        self.rows.leave(task)
        self.unstarted.pop(task.id, None)
        if task in self.starting:
            self.starting.remove(task)
        elif task.place is Place.RUNNING:
            self.releasing.append(slot)
            self.growth.pop(slot, None)

    def begin(self, task: Task, pages: list[int], cached: int) -> None:
        """A seated task has its pages."""
        task.pages = pages
        task.enter(cached)
        task.place = Place.READY
        self.starting.append(task)

    def grow(self, task: Task, pages: list[int]) -> None:
        """A running task was given more pages; the driver learns of them with the next quantum."""
        task.pages.extend(pages)
        if task.place is Place.RUNNING:
            self.growth.setdefault(task.slot, []).extend(pages)

    def sent(self, quantum: Quantum) -> None:
        """A quantum is on its way."""
        self.thirsty = True
        seats = {i: (task, task.stay) for i, task in enumerate(self.slots) if task is not None}
        self.flight.append(InFlight(quantum, seats))

    def apply(self, step: Step, now: float) -> list[Produced]:
        """Record what a step produced; a task whose stay is over gets nothing."""
        flight = next(f for f in self.flight if f.quantum.id == step.quantum)
        flight.received += 1
        self.stalled = False
        self.steps += 1
        self.step_micros += 0.1 * (step.micros - self.step_micros) if self.step_micros else step.micros
        prefilled = context = 0
        for chunk in flight.quantum.chunks:
            if chunk.step != step.index:
                continue
            prefilled += chunk.length
            if (task := flight.sitter(chunk.slot)) is not None:
                task.computed = max(task.computed, chunk.start + chunk.length)
        ends = dict(step.finished)
        produced: dict[int, Produced] = {}
        for slot, token in zip(step.slots, step.tokens, strict=True):
            task = flight.sitter(slot)
            if task is None:
                continue
            task.computed = len(task.tokens)
            if slot not in produced:
                context += task.computed
                produced[slot] = Produced(task, [], ends.get(slot))
            task.tokens.append(token)
            produced[slot].tokens.append(token)
            self.tokens += 1
        for slot in ends.keys() - produced.keys():
            if (task := flight.sitter(slot)) is not None:
                produced[slot] = Produced(task, [], ends[slot])
        self._pace(flight, step.index, produced)
        self.times.observe(len(set(step.slots)), context, prefilled, step.micros / 1e6, now)
        return list(produced.values())

    def _pace(self, flight: InFlight, index: int, produced: dict[int, Produced]) -> None:
        """Correct the plans, which know of one token a step, where a driver speculates or lacked pages."""
        for item in produced.values():
            if len(item.tokens) != 1 or item.task.pace != 1.0:
                item.task.gain(len(item.tokens))
                self.thirsty = True
        if len(produced) < len(flight.gaining):
            for slot, (first, last) in flight.gaining.items():
                if slot not in produced and first <= index <= last and (task := flight.sitter(slot)):
                    task.gain(0)

    def cut(self, steps: dict[int, int]) -> None:
        """What was taken back ends after so many steps, by quantum; what comes before and is not among them
        had been dispatched whole. Once the last of all is among them nothing is left to wait for."""
        for flight in self.flight:
            if flight.quantum.id in steps:
                flight.end_after(steps[flight.quantum.id])
        if self.flight and self.flight[-1].final:
            self.draining = False
            self.stalled = self.stalled and not self.busy
        self._plan_again()

    def done(self, done: QuantumDone) -> None:
        """A quantum ended: it may have had fewer steps than planned."""
        self.flight = deque(f for f in self.flight if f.quantum.id != done.quantum)
        self.draining = self.draining and bool(self.flight)
        self._plan_again()

    def _plan_again(self) -> None:
        """Plans give way to what is in flight."""
        self.thirsty = True
        for task in self.running:
            if task.place is Place.RUNNING:
                task.settle(sum(flight.coming(task) for flight in self.flight))
                if task.computed < task.base:
                    task.prefilled = max([task.computed, *(flight.prefills(task) for flight in self.flight)])

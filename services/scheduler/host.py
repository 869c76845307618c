"""One model on one driver: who is in which slot, which quanta are in flight, and what they produced. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf

from llmos.drivers.sdk.messages import FinishReason, LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.prefixes import Computing
from llmos.services.scheduler.rows import Rows
from llmos.services.scheduler.steptime import StepTimes
from llmos.services.scheduler.task import Place, Task
from llmos.services.scheduler.tiers import HostTiers

QUANTA_IN_FLIGHT = 2


def arena_name(driver: str, model: str, replica: int = 0) -> str:
    """The name of the KV pages of a replica; the first is called as if it were the only one."""
    return f"{driver}/{model}#{replica}" if replica else f"{driver}/{model}"


@dataclass(slots=True)
class InFlight:
    """A quantum that was sent, who sat in the slots: (task, which of its stays on a device this is), and the
    first and last step in which each slot gains tokens."""

    quantum: Quantum
    seats: dict[int, tuple[Task, int]]
    gaining: dict[int, tuple[int, int]]
    received: int = 0

    def sitter(self, slot: int) -> Task | None:
        """Who sat in a slot and sits there still; None if that stay is over."""
        task, stay = self.seats.get(slot, (None, 0))
        return task if task is not None and task.stay == stay and task.place is Place.RUNNING else None

    def coming(self, task: Task, steps: int = 1 << 30) -> int:
        """How many tokens of a task are on their way in the next ``steps``, at one a step."""
        if self.sitter(task.slot) is not task or task.slot not in self.gaining:
            return 0
        first, last = self.gaining[task.slot]
        return max(0, min(last + 1, self.received + steps) - max(first, self.received))

    @property
    def tasks(self) -> list[Task]:
        """Those of the tasks that are still there."""
        return [task for slot in self.seats if (task := self.sitter(slot)) is not None]


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
    task; ``resting`` are the ids of tasks that hold still for the sake of other tenants; ``keepers`` have
    pages here and no slot; ``tenants`` counts the slots of each, ``rows`` those of the interactive band,
    ``unstarted`` who has a slot and is in no quantum yet; ``thirsty`` says that someone who runs may need
    pages that nobody asked for. ``sharers`` are the models in its pool, of which none waits for its share if
    it ``may_borrow``; if it ``yields``, one waits for more than that, or for its
    share. ``favoured`` is who is lent more than the share. It is ``tight`` from when pages were refused until
    nobody waits.
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
    short_of_pages: bool = False
    steps: int = 0
    tokens: int = 0
    step_micros: float = 0.0
    times: StepTimes = field(default_factory=StepTimes)
    promised: dict[int, Task] = field(default_factory=dict)
    crunch: bool = False
    solo: bool = False
    started: list[float] = field(default_factory=lambda: [-inf] * len(BANDS))
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
        return self.ready and not self.draining and len(self.flight) < QUANTA_IN_FLIGHT

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
        self.flight.append(InFlight(quantum, seats, _gaining(quantum, seats)))

    def apply(self, step: Step) -> list[Produced]:
        """Record what a step produced; a task whose stay is over gets nothing."""
        flight = next(f for f in self.flight if f.quantum.id == step.quantum)
        flight.received += 1
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
        self.times.observe(len(set(step.slots)), context, prefilled, step.micros / 1e6)
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

    def done(self, done: QuantumDone) -> None:
        """A quantum ended: it may have had fewer steps than planned. Once none is in flight, the same holds
        for prompts."""
        self.flight = deque(f for f in self.flight if f.quantum.id != done.quantum)
        self.thirsty = True
        for task in self.running:
            if task.place is Place.RUNNING:
                task.settle(sum(flight.coming(task) for flight in self.flight))
                if not self.flight:
                    task.prefilled = min(task.base, task.computed)
        self.draining = self.draining and bool(self.flight)


def _gaining(quantum: Quantum, seats: dict[int, tuple[Task, int]]) -> dict[int, tuple[int, int]]:
    """In which steps each slot gains tokens: from its last chunk on, or from the first if it has none."""
    last = quantum.steps - 1
    found = dict.fromkeys(quantum.decode, (0, last))
    for chunk in quantum.chunks:
        if chunk.slot in seats and chunk.start + chunk.length == seats[chunk.slot][0].base:
            found[chunk.slot] = chunk.step, last if chunk.slot in found else chunk.step
    return found

"""A discrete-event simulator: the real core and the real memory policy against a model of the device's time.

Weeks of traffic run in seconds, and a policy is compared with others on the same trace. Nothing is mocked
but time: messages take ``latency`` seconds, steps take what ``StepTime`` says, the second is dispatched
shortly before the first ends as in the driver SDK, and tokens are those of the null driver, so that every
task's output can be checked. With a ``burst`` a step gives a task up to so many tokens, as a driver that
speculates.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmos.drivers.null.driver import burst_of, next_token
from llmos.drivers.sdk.messages import FinishReason, LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.errors import LLMOSError, NoMemory
from llmos.services.memory.arena import Arena
from llmos.services.memory.messages import Arena as ArenaSpec
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.task import Task

IN_FLIGHT = 2
DISPATCH_AHEAD = 2.0e-3  # seconds before the running step ends, as the driver SDK does it


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: ``base``, plus for each decoding row, each token of context read, each prefilled
    token. The defaults are a 8B model in bfloat16 on one H200."""

    base: float = 4.6e-3
    row: float = 7.0e-6
    context: float = 4.2e-8
    prefill: float = 2.1e-5

    def of(self, rows: int, context: int, prefilled: int) -> float:
        return self.base + self.row * rows + self.context * context + self.prefill * prefilled


@dataclass(slots=True)
class Record:
    """What became of a task: times of its tokens, and how it ended."""

    task: Task
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    reason: Reason | None = None
    error: LLMOSError | None = None

    @property
    def in_time(self) -> bool:
        """Whether the task came to its end, and before its deadline."""
        return self.reason is not None and (not self.task.deadline or self.ended <= self.task.deadline)

    @property
    def first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.task.arrived


class Simulator:
    """One model on one device, or on ``hosts`` of them. Feed it with ``submit`` at any time, then ``run``."""

    def __init__(
        self,
        model: LoadedModel,
        step_time: StepTime,
        *,
        max_steps: int = 8,
        latency: float = 2.5e-4,
        hosts: int = 1,
        burst: int = 1,
        make_core: Callable[[Simulator, int], Core] = Core,
    ) -> None:
        self.now = 0.0
        self.records: dict[int, Record] = {}
        self.busy = 0.0
        self.core = make_core(self, max_steps)
        self._step_time = step_time
        self._latency = latency
        self.burst = burst
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.hosts = [Host(f"sim{i}", model) for i in range(hosts)]
        self.host = self.hosts[0]
        self.memories = {host.arena: Arena(_arena(host)) for host in self.hosts}
        self.memory = self.memories[self.host.arena]
        self._devices = {host.arena: _Device(self, host) for host in self.hosts}
        for host in self.hosts:
            self.core.add_host(host, 0.0)

    def submit(self, tasks: Iterable[Task]) -> None:
        """Let tasks arrive at their ``arrived`` times."""
        for task in tasks:
            self.records[task.id] = Record(task)
            self.at(task.arrived, lambda task=task: self._arrive(task))  # type: ignore[misc]

    def _arrive(self, task: Task) -> None:
        try:
            self.core.submit(task, self.now)
        except LLMOSError as error:
            record = self.records[task.id]
            record.ended, record.error = self.now, error

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def run(self, until: float = float("inf")) -> None:
        """Run until nothing is left to happen, or until a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def soon(self, event: Callable[[], None]) -> None:
        """A message arrives after its latency; messages keep their order."""
        self.at(self.now + self._latency, event)

    # --- the core's effects ---

    def reserve(self, host: Host, task: Task, extra: int) -> None:
        memory = self.memories[host.arena]

        def answer() -> None:
            try:
                pages, cached = memory.reserve(task.id, task.tenant, list(task.tokens), extra, task.max_pages)
            except NoMemory as error:
                self.soon(lambda error=error: self.core.refused(host, task, self.now, error))  # type: ignore[misc]
            else:
                self.soon(lambda: self.core.reserved(host, task, pages, cached, self.now))

        self.soon(answer)

    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None:
        asked = {task.id: (task, task.residence) for task, _ in wants}
        memory = self.memories[host.arena]

        def answer() -> None:
            # A task that gave its pages back meanwhile is unknown to memory by now.
            gets = memory.grow([(t.id, n) for t, n in wants if t.id in memory.tasks])
            self.soon(lambda: self.core.grown(host, [(*asked[i], pages) for i, pages in gets], self.now))

        self.soon(answer)

    def free(self, host: Host, tasks: list[Task]) -> None:
        self.soon(lambda: self.memories[host.arena].free([task.id for task in tasks]))

    def commit(self, host: Host, tasks: list[Task]) -> None:
        lines = [(task.id, task.tokens[task.committed :], task.computed) for task in tasks]
        for task in tasks:
            task.committed = len(task.tokens)
        memory = self.memories[host.arena]
        self.soon(lambda: memory.commit([line for line in lines if line[0] in memory.tasks]))

    def execute(self, host: Host, quantum: Quantum) -> None:
        self.soon(lambda: self._devices[host.arena].submit(quantum))

    def preempt(self, host: Host, quantum: int) -> None:
        self.soon(lambda: self._devices[host.arena].preempt(quantum))

    def emit(self, produced: list[Produced]) -> None:
        for item in produced:
            self.records[item.task.id].times += [self.now] * len(item.tokens)

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        record = self.records[task.id]
        record.ended, record.reason, record.error = self.now, reason, error

    def step_seconds(self, rows: int, context: int, prefilled: int) -> float:
        return self._step_time.of(rows, context, prefilled)


@dataclass(slots=True)
class _Seat:
    tokens: list[int]
    computed: int
    stop: list[int]
    limit: int
    known: int
    capacity: int
    finished: bool = False

    def gain(self, tokens: int) -> FinishReason | None:
        """Produce up to so many tokens, as far as the pages reach; why the sequence ended, if it did."""
        for _ in range(min(tokens, self.capacity + 1 - len(self.tokens))):
            token = next_token(self.tokens)
            self.computed = len(self.tokens)
            self.tokens.append(token)
            if token in self.stop or len(self.tokens) >= self.limit:
                self.finished = True
                return "stop" if token in self.stop else "length"
        return None


class _Device:
    """A driver in simulated time: dispatches a step ahead, and looks for a preempt in between."""

    def __init__(self, simulator: Simulator, host: Host) -> None:
        self._sim = simulator
        self._host = host
        self._queue: deque[Quantum] = deque()
        self._seats: dict[int, _Seat] = {}
        self._next_step = 0
        self._entered = False
        self._preempted = 0
        self._in_flight = 0
        self._free_at = 0.0

    def submit(self, quantum: Quantum) -> None:
        self._queue.append(quantum)
        self._dispatch()

    def preempt(self, quantum: int) -> None:
        self._preempted = max(self._preempted, quantum)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._in_flight < IN_FLIGHT:
            if self._in_flight and self._sim.now < (due := self._free_at - DISPATCH_AHEAD):
                self._sim.at(due, self._dispatch)
                return
            quantum = self._queue[0]
            if not self._entered:
                self._enter(quantum)
            cut = quantum.id <= self._preempted
            step = None if cut or self._next_step >= quantum.steps else self._step(quantum)
            if step is None:
                self._queue.popleft()
                done = QuantumDone(quantum.id, self._next_step, cut)
                self._at_end(lambda done=done: self._sim.core.done(self._host, done, self._sim.now))  # type: ignore[misc]
                self._next_step, self._entered = 0, False
            else:
                self._next_step += 1
                self._in_flight += 1
                self._at_end(self._landed)
                self._at_end(lambda step=step: self._sim.core.step(self._host, step, self._sim.now))  # type: ignore[misc]

    def _landed(self) -> None:
        self._in_flight -= 1
        self._dispatch()

    def _at_end(self, event: Callable[[], None]) -> None:
        """When what was dispatched so far is computed: our own event at once, the scheduler's by message."""
        delay = 0.0 if event == self._landed else self._sim._latency
        self._sim.at(max(self._free_at, self._sim.now) + delay, event)

    def _enter(self, quantum: Quantum) -> None:
        self._entered = True
        for slot in quantum.release:
            del self._seats[slot]
        for start in quantum.start:
            assert start.slot not in self._seats, f"slot {start.slot} is taken"
            self._seats[start.slot] = _Seat(
                list(start.tokens),
                start.cached,
                start.stop,
                start.limit,
                len(start.tokens),
                len(start.pages) * self._host.model.page_tokens,
            )
        for growth in quantum.grow:
            self._seats[growth.slot].capacity += len(growth.pages) * self._host.model.page_tokens

    def _step(self, quantum: Quantum) -> Step | None:
        """Compute a step's tokens now, and book the device's time for it."""
        seats, index = self._seats, self._next_step
        ready = [s for s in quantum.decode if _decodes(seats[s])]
        prefilled = 0
        for chunk in quantum.chunks:
            if chunk.step == index:
                seat = seats[chunk.slot]
                assert chunk.start == seat.computed, f"slot {chunk.slot}: a chunk is out of order"
                seat.computed += chunk.length
                prefilled += chunk.length
                if seat.computed == seat.known:
                    ready.append(chunk.slot)
        if not ready and not prefilled:
            return None
        tokens, finished = list[int](), list[tuple[int, FinishReason]]()
        context = sum(len(seats[slot].tokens) for slot in ready)
        slots = list[int]()
        for slot in ready:
            seat, before = seats[slot], len(seats[slot].tokens)
            if reason := seat.gain(burst_of(seat.tokens, self._sim.burst)):
                finished.append((slot, reason))
            tokens += seat.tokens[before:]
            slots += [slot] * (len(seat.tokens) - before)
            assert slots[-1:] == [slot] or self._sim.burst > 1, f"slot {slot} has no page for its token"
        seconds = self._sim.step_seconds(len(ready), context, prefilled)
        self._free_at = max(self._free_at, self._sim.now) + seconds
        self._sim.busy += seconds
        return Step(quantum.id, index, slots, tokens, finished, round(seconds * 1e6))


def _arena(host: Host) -> ArenaSpec:
    model = host.model
    return ArenaSpec(
        arena=host.arena, pages=model.pages, page_tokens=model.page_tokens, page_bytes=model.page_bytes
    )


def _decodes(seat: _Seat) -> bool:
    return not seat.finished and len(seat.tokens) > seat.known

"""Keeps the device fed: at most two steps in flight, the second dispatched shortly before the first ends.

The steps of quanta and those of encoders take turns, so that neither waits for more than one of the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any, Protocol

import msgspec

from llmos.drivers.sdk.driver import Driver, PendingStep
from llmos.drivers.sdk.messages import EncodedStep, EncodeStep, Quantum, QuantumDone, Step
from llmos.drivers.sdk.timing import Clock, Timed, Timing
from llmos.ipc.errors import Canceled, LLMOSError

IN_FLIGHT = 2
POLL_SECONDS = 5e-5


class Sink(Protocol):
    """Where the results of one quantum go."""

    def step(self, step: Step) -> None: ...
    def done(self, done: QuantumDone) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


class EncodingSink(Protocol):
    """Where the result of one encoder's step goes."""

    def encoded(self, result: EncodedStep) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


class _Run:
    """A quantum that is queued or being dispatched."""

    def __init__(self, quantum: Quantum, sink: Sink) -> None:
        self.quantum = quantum
        self.sink = sink
        self.steps: Iterator[PendingStep] | None = None
        self.dispatched = 0
        self.preempted = False

    @property
    def model(self) -> str:
        return self.quantum.model


class _Encoding:
    """A step of an encoder that is queued or in flight."""

    def __init__(self, request: EncodeStep, sink: EncodingSink) -> None:
        self.request = request
        self.sink = sink

    @property
    def model(self) -> str:
        return self.request.model


class _Barrier:
    """What is to be done once the quanta before it are dispatched."""

    def __init__(self, model: str, function: Callable[[], None]) -> None:
        self.model = model
        self.function = function


class _Lane:
    """The steps of one replica, run in the order they came."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock
        self._timing = Timing()
        self._queue: deque[_Run | _Barrier] = deque()
        self._encodings: deque[_Encoding] = deque()
        self._turn = False  # of the encodings
        self._pending: deque[tuple[_Run | _Encoding, Timed | None]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._encodings or self._pending)

    @property
    def waits(self) -> bool:
        """Whether delivering now would wait for the device."""
        if not self._pending:
            return True
        pending = self._pending[0][1]
        return pending is not None and not pending.ready()

    def pause(self) -> float:
        """Seconds until something is to be dispatched or delivered: the end of a quantum is at once."""
        return 0.0 if self._pending and self._pending[0][1] is None else self._hold()

    def _hold(self) -> float:
        """Seconds until the step behind the only one on the device is to be dispatched."""
        steps = [step for _, step in self._pending if step is not None]
        return steps[0].pause() if len(steps) == 1 else 0.0

    def submit(self, quantum: Quantum, sink: Sink) -> None:
        self._queue.append(_Run(quantum, sink))

    def after(self, model: str, function: Callable[[], None]) -> None:
        self._queue.append(_Barrier(model, function))

    def encode(self, request: EncodeStep, sink: EncodingSink) -> None:
        self._encodings.append(_Encoding(request, sink))

    def starts_with(self, model: str, adapter: str) -> bool:
        waiting = [run for run in self._queue if isinstance(run, _Run) and run.steps is None]
        starts = [start for run in waiting if run.model == model for start in run.quantum.start]
        return any(start.adapter == adapter for start in starts)

    def preempt(self, quantum: int) -> list[tuple[int, int]]:
        sent = {run.quantum.id: run for run in self._runs()}
        if (last := sent.get(quantum)) is None:
            return []
        # Another model's quantum runs on: its next one may count on the steps.
        ended = [run for run in sent.values() if run.model == last.model and run.quantum.id <= quantum]
        for run in ended:
            run.preempted = run.preempted or run in self._queue
        return [(run.quantum.id, run.dispatched) for run in ended]

    def _runs(self) -> Iterator[_Run]:
        """The quanta that have not ended, in their order."""
        yield from (run for run, _ in self._pending if isinstance(run, _Run))
        yield from (run for run in self._queue if isinstance(run, _Run))

    def abandon(self, model: str) -> None:
        gone: set[_Run | _Encoding] = {
            run
            for run in (*self._queue, *self._encodings, *(run for run, _ in self._pending))
            if model in ("", run.model) and not isinstance(run, _Barrier)
        }
        for run in gone:
            if isinstance(run, _Run) and run in self._queue and run.steps is not None:
                _close(run.steps)
        for run, pending in self._pending:
            if run in gone and pending is not None:
                pending()
        for run in gone:
            run.sink.fail(Canceled("the driver's slots were emptied"))
        self._queue = deque(run for run in self._queue if model not in ("", run.model))
        self._encodings = deque(run for run in self._encodings if run not in gone)
        self._pending = deque(entry for entry in self._pending if entry[0] not in gone)

    def dispatch(self) -> None:
        """Dispatch what is due, at most until two steps are in flight."""
        while (self._queue or self._encodings) and self._in_flight < IN_FLIGHT and not self._hold():
            head = self._queue[0] if self._queue else None
            if isinstance(head, _Barrier):
                self._queue.popleft()
                head.function()
                continue
            if self._encodings and (self._turn or head is None):
                self._dispatch_encoding(self._encodings.popleft())
            elif head is not None:
                self._dispatch(head)
            self._turn = not self._turn

    def deliver(self) -> None:
        """Wait for the oldest step and pass on what it produced, unless it is too early to wait."""
        if self._pending and not self.pause():
            self._deliver(*self._pending.popleft())

    @property
    def _in_flight(self) -> int:
        return sum(pending is not None for _, pending in self._pending)

    def _dispatch_encoding(self, run: _Encoding) -> None:
        try:
            self._pending.append((run, self._timed(_shape(run.request), self._driver.encode(run.request))))
        except LLMOSError as error:
            run.sink.fail(error)

    def _dispatch(self, run: _Run) -> None:
        """Dispatch one step, or find that the quantum has no more."""
        try:
            pending = self._next(run)
        except LLMOSError as error:
            self._queue.popleft()
            run.sink.fail(error)
            return
        if pending is None:
            self._queue.popleft()
            self._pending.append((run, None))
        else:
            self._pending.append((run, self._timed(_kind(run.quantum, run.dispatched), pending)))
            run.dispatched += 1

    def _timed(self, kind: Hashable, result: Callable[[], Any]) -> Timed:
        if self._pending and (last := self._pending[-1][1]) is not None:
            last.follow()
        return Timed(self._timing, kind, result, self._clock)

    def _next(self, run: _Run) -> PendingStep | None:
        if run.steps is None:
            # Preempted before it began: its slots change hands, but it runs no step.
            quantum = _without_steps(run.quantum) if run.preempted else run.quantum
            run.steps = iter(self._driver.execute(quantum))
        elif run.preempted:
            _close(run.steps)
            return None
        return next(run.steps, None)

    def _deliver(self, run: _Run | _Encoding, pending: Timed | None) -> None:
        if pending is None:
            assert isinstance(run, _Run)
            run.sink.done(QuantumDone(run.quantum.id, run.dispatched, run.preempted))
            return
        try:
            result = pending()
        except LLMOSError as error:
            if isinstance(run, _Run):
                self._abort(run)
            run.sink.fail(error)
        else:
            run.sink.step(result) if isinstance(run, _Run) else run.sink.encoded(result)

    def _abort(self, failed: _Run) -> None:
        """A step failed on the device: nothing that was dispatched after it can be trusted."""
        self._pending = deque(entry for entry in self._pending if entry[0] is not failed)
        if self._queue and self._queue[0] is failed:
            self._queue.popleft()


class Executor:
    """Runs the quanta of each replica in their order; call ``advance`` for as long as it returns True.

    Replicas run beside each other: while one's step runs, the others are kept fed, and what is sent to them
    is looked for. What arrives within the seconds of ``pause`` can be part of the next step: whoever has
    messages looks for them so long.
    """

    def __init__(
        self,
        driver: Driver,
        pause: Callable[[float], None] = time.sleep,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._driver = driver
        self._pause = pause
        self._clock = clock
        self._lanes: dict[int, _Lane] = {}

    def submit(self, quantum: Quantum, sink: Sink) -> None:
        self._lane(quantum.replica).submit(quantum, sink)

    def after(self, model: str, replica: int, function: Callable[[], None]) -> None:
        """Call ``function`` once the steps of all quanta submitted so far for a replica are dispatched; never
        if the model is abandoned there."""
        self._lane(replica).after(model, function)

    def encode(self, request: EncodeStep, sink: EncodingSink) -> None:
        """Run a step of an encoder, in turns with the quanta of the first replica."""
        self._lane(0).encode(request, sink)

    def starts_with(self, model: str, adapter: str) -> bool:
        """Whether a quantum that waits starts a sequence with this adapter."""
        return any(lane.starts_with(model, adapter) for lane in self._lanes.values())

    def preempt(self, quantum: int) -> list[tuple[int, int]]:
        """Dispatch no further step of this quantum or of any before it for its model and replica; their slots
        still change hands. Returns those that end by it, and how many steps of each were dispatched."""
        return [cut for lane in self._lanes.values() for cut in lane.preempt(quantum)]

    def abandon(self, model: str = "", replica: int = -1) -> None:
        """Run nothing that is queued for a model (any, if none is named) and a replica (any, if -1), and wait
        for what is in flight; nobody wants the results."""
        for number, lane in self._lanes.items():
            if replica in (-1, number):
                lane.abandon(model)

    def pause(self) -> float:
        """Seconds until something is to be dispatched or delivered."""
        return min((lane.pause() for lane in self._lanes.values() if lane.busy), default=0.0)

    def advance(self) -> bool:
        """Dispatch until two steps of each replica are in flight, then deliver the oldest of whichever is
        done first; False when nothing is left."""
        for lane in self._lanes.values():
            lane.dispatch()
        busy = [lane for lane in self._lanes.values() if lane.busy]
        if busy and len(self._lanes) > 1:
            done = [lane for lane in busy if not lane.waits]
            if not done:
                self._pause(POLL_SECONDS)
            busy = done
        for lane in busy:
            lane.deliver()
        return any(lane.busy for lane in self._lanes.values())

    def _lane(self, replica: int) -> _Lane:
        return self._lanes.setdefault(replica, _Lane(self._driver, self._clock))


def _kind(quantum: Quantum, index: int) -> Hashable:
    """Steps of one kind take about as long: one model, with like numbers of rows and prompt tokens."""
    prefilled = sum(chunk.length for chunk in quantum.chunks if chunk.step == index)
    return quantum.model, len(quantum.decode).bit_length(), prefilled.bit_length()


def _shape(request: EncodeStep) -> Hashable:
    """As ``_kind``: like numbers of texts, and of tokens in the longest."""
    longest = max(map(len, request.texts), default=0)
    return request.model, (len(request.texts) - 1).bit_length(), (longest - 1).bit_length()


def _without_steps(quantum: Quantum) -> Quantum:
    return msgspec.structs.replace(quantum, steps=0, chunks=[], decode=[])


def _close(steps: Iterator[PendingStep]) -> None:
    """Let a generator leave at its last yield."""
    if isinstance(steps, Generator):
        steps.close()

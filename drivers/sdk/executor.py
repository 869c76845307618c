"""Keeps the device fed: at most two steps in flight, the next quantum begun before the last one's results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import msgspec

from llmos.drivers.sdk.driver import Driver, PendingStep
from llmos.drivers.sdk.messages import Quantum, QuantumDone, Step
from llmos.ipc.errors import Canceled, LLMOSError

IN_FLIGHT = 2


class Sink(Protocol):
    """Where the results of one quantum go."""

    def step(self, step: Step) -> None: ...
    def done(self, done: QuantumDone) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


class _Run:
    """A quantum that is queued or being dispatched."""

    def __init__(self, quantum: Quantum, sink: Sink) -> None:
        self.quantum = quantum
        self.sink = sink
        self.steps: Iterator[PendingStep] | None = None
        self.dispatched = 0
        self.preempted = False


class Executor:
    """Runs quanta in the order they came; call ``advance`` for as long as it returns True."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._queue: deque[_Run | Callable[[], None]] = deque()
        self._pending: deque[tuple[_Run, PendingStep | None]] = deque()

    def submit(self, quantum: Quantum, sink: Sink) -> None:
        self._queue.append(_Run(quantum, sink))

    def after(self, function: Callable[[], None]) -> None:
        """Call ``function`` once the steps of all quanta submitted so far are dispatched; never if they are
        abandoned."""
        self._queue.append(function)

    def preempt(self, quantum: int) -> None:
        """Dispatch no further step of this quantum or of any before it; their slots still change hands."""
        for run in self._runs():
            if run.quantum.id <= quantum:
                run.preempted = True

    def abandon(self) -> None:
        """Run nothing that is queued, and wait for what is in flight; nobody wants the results."""
        for run in self._runs():
            if run.steps is not None:
                _close(run.steps)
        for _, pending in self._pending:
            if pending is not None:
                pending()
        # A quantum may be queued and pending at once.
        for run in {*self._runs(), *(run for run, _ in self._pending)}:
            run.sink.fail(Canceled("the driver's slots were emptied"))
        self._queue.clear()
        self._pending.clear()

    def advance(self) -> bool:
        """Dispatch until two steps are in flight, then deliver the oldest; False when nothing is left."""
        while self._queue and sum(pending is not None for _, pending in self._pending) < IN_FLIGHT:
            head = self._queue[0]
            if isinstance(head, _Run):
                self._dispatch(head)
            else:
                self._queue.popleft()
                head()
        if self._pending:
            self._deliver(*self._pending.popleft())
        return bool(self._queue or self._pending)

    def _runs(self) -> list[_Run]:
        return [entry for entry in self._queue if isinstance(entry, _Run)]

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
            run.dispatched += 1
            self._pending.append((run, pending))

    def _next(self, run: _Run) -> PendingStep | None:
        if run.steps is None:
            # Preempted before it began: its slots change hands, but it runs no step.
            quantum = _without_steps(run.quantum) if run.preempted else run.quantum
            run.steps = iter(self._driver.execute(quantum))
        elif run.preempted:
            _close(run.steps)
            return None
        return next(run.steps, None)

    def _deliver(self, run: _Run, pending: PendingStep | None) -> None:
        if pending is None:
            run.sink.done(QuantumDone(run.quantum.id, run.dispatched, run.preempted))
            return
        try:
            run.sink.step(pending())
        except LLMOSError as error:
            self._abort(run)
            run.sink.fail(error)

    def _abort(self, failed: _Run) -> None:
        """A step failed on the device: nothing that was dispatched after it can be trusted."""
        self._pending = deque(entry for entry in self._pending if entry[0] is not failed)
        if self._queue and self._queue[0] is failed:
            self._queue.popleft()


def _without_steps(quantum: Quantum) -> Quantum:
    return msgspec.structs.replace(quantum, steps=0, chunks=[], decode=[])


def _close(steps: Iterator[PendingStep]) -> None:
    """Let a generator leave at its last yield."""
    if isinstance(steps, Generator):
        steps.close()

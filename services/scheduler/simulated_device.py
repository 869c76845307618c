"""A driver in simulated time: tokens of the null driver, steps that take what the step-time model says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmos.drivers.null.driver import burst_of, next_token
from llmos.drivers.sdk.messages import FinishReason, Moved, Quantum, QuantumDone, Step
from llmos.services.memory.messages import Batch
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.simulated_cache import DEVICE_SPEED, Pages, prefix_hashes

if TYPE_CHECKING:
    from llmos.services.scheduler.simulator import Simulator

IN_FLIGHT = 2
DISPATCH_AHEAD = 2.0e-3  # seconds before the running step ends, as the driver SDK does it


@dataclass(slots=True)
class _Seat:
    tokens: list[int]
    computed: int
    stop: list[int]
    limit: int
    known: int
    capacity: int
    table: list[int] = field(default_factory=list)
    written: int = 0  # positions whose KV is in the simulated pages
    hashes: list[int] = field(default_factory=list)
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


class Device:
    """Dispatches a step ahead, and looks for a preempt in between."""

    def __init__(self, simulator: Simulator, host: Host) -> None:
        self._sim = simulator
        self._host = host
        self._queue: deque[Quantum | Callable[[], None]] = deque()
        self._seats: dict[int, _Seat] = {}
        self._next_step = 0
        self._entered = False
        self._preempted = 0
        self._in_flight = 0
        self._free_at = 0.0
        self._link_free = {"device": 0.0, "host": 0.0, "disk": 0.0}  # by source: each direction is its own
        self.dead = False
        self.fail_moves = 0  # so many of the next moves fail
        self.pages = Pages(host.model.page_tokens, simulator.checked)

    def submit(self, quantum: Quantum) -> None:
        self._queue.append(quantum)
        self._dispatch()

    def preempt(self, quantum: int) -> None:
        self._preempted = max(self._preempted, quantum)
        self._dispatch()

    def _dispatch(self) -> None:
        while not self.dead and self._queue and self._in_flight < IN_FLIGHT:
            if self._in_flight and self._sim.now < (due := self._free_at - DISPATCH_AHEAD):
                self._sim.at(due, self._dispatch)
                return
            quantum = self._queue[0]
            if not isinstance(quantum, Quantum):
                self._queue.popleft()
                quantum()
                continue
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

    def move(self, batch: Batch, answered: Callable[[Moved | None], None]) -> None:
        """Copy pages beside the steps. What reads the device does so after the quanta that came before; what
        writes it waits for them too."""
        if self.dead or self.fail_moves:
            self.fail_moves -= not self.dead
            self._sim.soon(lambda: answered(None))
            return
        size = self._host.model.page_bytes
        sources, targets = [s for s, _ in batch.pages], [t for _, t in batch.pages]
        contents = [] if batch.source == "device" else self.pages.read(batch.source, sources)
        waits = [True, True]  # to be reached by the queue; to be copied
        spent = self._sim.link_time.of(batch, size)

        def copy(start: float) -> None:
            start = max(start, self._link_free[batch.source])
            self._link_free[batch.source] = end = start + spent
            self._sim.at(end, copied)

        def reached() -> None:
            if batch.source == "device":
                contents.extend(self.pages.read("device", sources))
                self._free_at = max(self._free_at, self._sim.now) + len(sources) * size / DEVICE_SPEED
                copy(self._free_at)
            waits[0] = False
            finish()

        def copied() -> None:
            waits[1] = False
            finish()

        def finish() -> None:
            if any(waits):
                return
            if self.dead:
                self._sim.soon(lambda: answered(None))
                return
            if batch.target == "device":
                self._free_at = max(self._free_at, self._sim.now) + len(sources) * size / DEVICE_SPEED
            self.pages.put(batch.target, targets, contents)
            self._sim.soon(lambda: answered(Moved(len(sources) * size, max(1, round(spent * 1e6)))))

        if batch.source != "device":
            copy(self._sim.now)
        self._queue.append(reached)
        self._dispatch()

    def _landed(self) -> None:
        self._in_flight -= 1
        self._dispatch()

    def _at_end(self, event: Callable[[], None]) -> None:
        """When what was dispatched so far is computed: our own event at once, the scheduler's by message."""
        delay = 0.0 if event == self._landed else self._sim.latency
        at = max(self._free_at, self._sim.now) + delay
        self._sim.at(at, lambda: None if self.dead else event())

    def _enter(self, quantum: Quantum) -> None:
        self._entered = True
        for slot in quantum.release:
            del self._seats[slot]
        for start in quantum.start:
            assert start.slot not in self._seats, f"slot {start.slot} is taken"
            seat = self._seats[start.slot] = _Seat(
                list(start.tokens),
                start.cached,
                start.stop,
                start.limit,
                len(start.tokens),
                len(start.pages) * self._host.model.page_tokens,
                list(start.pages),
            )
            if self.pages.checked:
                seat.written = start.cached
                prefix_hashes(seat.tokens, seat.hashes)
                self.pages.check(seat.table, seat.hashes, start.cached)
        for growth in quantum.grow:
            seat = self._seats[growth.slot]
            seat.capacity += len(growth.pages) * self._host.model.page_tokens
            seat.table.extend(growth.pages)

    def _compute(self, seat: _Seat, stop: int) -> None:
        if self.pages.checked:
            prefix_hashes(seat.tokens[:stop], seat.hashes)
            self.pages.write(seat.table, seat.hashes, seat.written, stop)
        seat.written = seat.computed = stop

    def _step(self, quantum: Quantum) -> Step | None:
        """Compute a step's tokens now, and book the device's time for it."""
        seats, index = self._seats, self._next_step
        ready = [s for s in quantum.decode if _decodes(seats[s])]
        prefilled = 0
        for chunk in quantum.chunks:
            if chunk.step == index:
                seat = seats[chunk.slot]
                assert chunk.start == seat.computed, f"slot {chunk.slot}: a chunk is out of order"
                self._compute(seat, seat.computed + chunk.length)
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
            self._compute(seat, seat.computed)
            tokens += seat.tokens[before:]
            slots += [slot] * (len(seat.tokens) - before)
            assert slots[-1:] == [slot] or self._sim.burst > 1, f"slot {slot} has no page for its token"
        self._sim.prefilled += prefilled
        seconds = self._sim.step_seconds(len(ready), context, prefilled)
        self._free_at = max(self._free_at, self._sim.now) + seconds
        self._sim.busy += seconds
        return Step(quantum.id, index, slots, tokens, finished, round(seconds * 1e6))


def _decodes(seat: _Seat) -> bool:
    return not seat.finished and len(seat.tokens) > seat.known

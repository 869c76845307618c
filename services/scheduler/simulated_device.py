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


class Lane:
    """The quanta of all models of a device, in the order in which they came."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Device, Quantum | Callable[[], None]]] = deque()
        self.next_step = 0
        self.entered = False
        self.in_flight = 0
        self.free_at = 0.0


class Device:
    """One model of a device: dispatches a step ahead, and looks for a preempt in between."""

    def __init__(self, simulator: Simulator, host: Host, lane: Lane | None = None) -> None:
        self._sim = simulator
        self._host = host
        self._lane = lane or Lane()
        self._preempted = 0
        self._seats: dict[int, _Seat] = {}
        self._link_free = {"device": 0.0, "host": 0.0, "disk": 0.0}  # by source: each direction is its own
        self.dead = False
        self.fail_moves = 0  # so many of the next moves fail
        self.pages = Pages(host.model.page_tokens, simulator.checked)

    def submit(self, quantum: Quantum) -> None:
        self._lane.queue.append((self, quantum))
        self._dispatch()

    def preempt(self, quantum: int) -> None:
        self._preempted = max(self._preempted, quantum)
        if self._sim.tells:
            cut, sim, host = self._dispatched(quantum), self._sim, self._host
            sim.soon(lambda: None if self.dead else sim.core.cut(host, cut, sim.now))
        self._dispatch()

    def _dispatched(self, last: int) -> dict[int, int]:
        """How many steps were dispatched of each of the quanta that wait or run, up to the last."""
        lane = self._lane
        return {
            queued.id: lane.next_step if index == 0 and lane.entered else 0
            for index, (device, queued) in enumerate(lane.queue)
            if device is self and isinstance(queued, Quantum) and queued.id <= last
        }

    def _dispatch(self) -> None:
        lane, sim = self._lane, self._sim
        while not self.dead and lane.queue and lane.in_flight < IN_FLIGHT:
            if lane.in_flight and sim.now < (due := lane.free_at - DISPATCH_AHEAD):
                sim.at(due, self._dispatch)
                return
            device, quantum = lane.queue[0]
            if isinstance(quantum, Quantum):
                device._advance(quantum)
            else:
                lane.queue.popleft()
                quantum()

    def _advance(self, quantum: Quantum) -> None:
        """Dispatch the next step of the first quantum in the lane, or end it."""
        lane, sim, host = self._lane, self._sim, self._host
        if not lane.entered:
            self._enter(quantum)
        cut = quantum.id <= self._preempted
        step = None if cut or lane.next_step >= quantum.steps else self._step(quantum)
        if step is None:
            lane.queue.popleft()
            done = QuantumDone(quantum.id, lane.next_step, cut)
            self._at_end(lambda: sim.core.done(host, done, sim.now))
            lane.next_step, lane.entered = 0, False
        else:
            lane.next_step += 1
            lane.in_flight += 1
            self._at_end(self._landed)
            self._at_end(lambda: sim.core.step(host, step, sim.now))

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
                self._lane.free_at = (
                    max(self._lane.free_at, self._sim.now) + len(sources) * size / DEVICE_SPEED
                )
                copy(self._lane.free_at)
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
                self._lane.free_at = (
                    max(self._lane.free_at, self._sim.now) + len(sources) * size / DEVICE_SPEED
                )
            self.pages.put(batch.target, targets, contents)
            self._sim.soon(lambda: answered(Moved(len(sources) * size, max(1, round(spent * 1e6)))))

        if batch.source != "device":
            copy(self._sim.now)
        self._lane.queue.append((self, reached))
        self._dispatch()

    def _landed(self) -> None:
        self._lane.in_flight -= 1
        self._dispatch()

    def _at_end(self, event: Callable[[], None]) -> None:
        """When what was dispatched so far is computed: our own event at once, the scheduler's by message."""
        delay = 0.0 if event == self._landed else self._sim.latency
        at = max(self._lane.free_at, self._sim.now) + delay
        self._sim.at(at, lambda: None if self.dead else event())

    def _enter(self, quantum: Quantum) -> None:
        self._lane.entered = True
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
        seats, index = self._seats, self._lane.next_step
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
        seconds = self._sim.step_seconds(self._host, len(ready), context, prefilled)
        self._lane.free_at = max(self._lane.free_at, self._sim.now) + seconds
        self._sim.busy += seconds
        return Step(quantum.id, index, slots, tokens, finished, round(seconds * 1e6))


def _decodes(seat: _Seat) -> bool:
    return not seat.finished and len(seat.tokens) > seat.known

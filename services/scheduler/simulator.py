"""A discrete-event simulator: the real core and the real memory policy against a model of the device's time.

Weeks of traffic run in seconds, and a policy is compared with others on the same trace. Nothing is mocked
but time: messages take ``latency`` seconds, steps take what ``StepTime`` says, the second is dispatched
shortly before the first ends as in the driver SDK, and tokens are those of the null driver, so that every
task's output can be checked. With a ``burst`` a step gives a task up to so many tokens, as a driver that
speculates. Moves between tiers take what ``LinkTime`` says, one after the other in each direction, while
steps go on; they are ordered with quanta as the driver SDK does it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from llmos.drivers.null.driver import burst_of, next_token
from llmos.drivers.sdk.messages import FinishReason, LoadedModel, Moved, Quantum, QuantumDone, Step
from llmos.ipc.errors import HostDown, LLMOSError, NoMemory
from llmos.services.memory.arena import Arena, restore
from llmos.services.memory.messages import Batch, Costs, Transfer
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.effects import arena_of, holdings
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.simulated_cache import DEVICE_SPEED, LinkTime, Pages, prefix_hashes
from llmos.services.scheduler.task import Place, Task

T = TypeVar("T")
IN_FLIGHT = 2
RETRY_SECONDS = 0.05
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
    """One model on one device, or on ``hosts`` of them. Feed it with ``submit`` at any time, then ``run``.
    ``checked`` asserts that every sequence finds its own KV in its pages."""

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
        link_time: LinkTime | None = None,
        checked: bool = False,
    ) -> None:
        self.now = 0.0
        self.records: dict[int, Record] = {}
        self.busy = 0.0
        self.core = make_core(self, max_steps)
        self._step_time = step_time
        self.link_time = link_time or LinkTime()
        self.checked = checked
        self.moved_bytes = self.prefilled = 0
        self._latency = latency
        self.burst = burst
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.hosts = [Host(f"sim{i}", model) for i in range(hosts)]
        self.host = self.hosts[0]
        self.memories = {host.arena: Arena(arena_of(host)) for host in self.hosts}
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

    def fail_move(self) -> None:
        """Let the next move on the first host fail."""
        self._devices[self.host.arena].fail_moves += 1

    def restart_driver(self) -> None:
        """The first host's driver dies and is there again: its pages and what it was doing are gone."""
        old = self.host
        self.core.lose_host(old, self.now)
        self._devices[old.arena].dead = True
        self.host = self.hosts[0] = Host(old.driver, old.model)
        self._devices[old.arena] = _Device(self, self.host)
        self.memory = self.memories[old.arena] = Arena(arena_of(self.host))
        self.core.add_host(self.host, self.now)

    def restart_memory(self) -> None:
        """Memory dies and is told at once what is held; calls that were on their way are lost."""
        seated = self.core.swapping.memory_lost(self.host)
        self.memory = self.memories[self.host.arena] = restore(holdings(self.core, self.host))
        for task in seated:
            self.core.reserve(self.host, task)

    def run(self, until: float = float("inf")) -> None:
        """Run until nothing is left to happen, or until a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def soon(self, event: Callable[[], None]) -> None:
        """A message arrives after its latency; messages keep their order."""
        self.at(self.now + self._latency, event)

    # --- the core's effects ---

    def _ask(
        self,
        host: Host,
        call: Callable[[Arena], T],
        reply: Callable[[T], None],
        fail: Callable[[LLMOSError], None],
    ) -> None:
        """A call to memory and its answer; HostDown where memory was started anew in between."""
        memory = self.memories[host.arena]

        def arrive() -> None:
            try:
                if self.memories[host.arena] is not memory:
                    raise HostDown("memory went down")
                answer = call(memory)
            except LLMOSError as error:
                self.soon(lambda error=error: fail(error))  # type: ignore[misc]
            else:
                self.soon(lambda: deliver(answer))

        def deliver(answer: T) -> None:
            # What memory said before it died arrives before the news of its death, or never.
            if self.memories[host.arena] is memory:
                reply(answer)
            else:
                fail(HostDown("memory went down"))

        self.soon(arrive)

    def _tell(self, host: Host, call: Callable[[Arena], object]) -> None:
        """A cast to memory; nobody learns what becomes of it."""
        self._ask(host, call, lambda _: None, lambda _: None)

    def reserve(self, host: Host, task: Task, extra: int) -> None:
        hurry = host.tiers.hurries(task)

        def call(memory: Arena) -> tuple[list[int], int, Transfer | None, bool]:
            pages, cached = memory.reserve(
                task.id, task.tenant, list(task.tokens), extra, task.max_pages, hurry
            )
            return pages, cached, _transfer(memory, task), memory.tiers.low

        def reply(got: tuple[list[int], int, Transfer | None, bool]) -> None:
            self.core.reserved(host, task, got[0], got[1], self.now, *got[2:])

        def fail(error: LLMOSError) -> None:
            if isinstance(error, NoMemory):
                self.core.refused(host, task, self.now, error)
            elif isinstance(error, HostDown):
                self.at(self.now + RETRY_SECONDS, lambda: self.reserve(host, task, extra))
            else:
                self.core.kill(task, error, self.now)

        if task.place is Place.RESERVING and self.core.hosts.get(host.arena) is host:
            self._ask(host, call, reply, fail)

    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None:
        asked = {task.id: (task, task.residence) for task, _ in wants}

        def call(memory: Arena) -> tuple[list[tuple[int, list[int]]], bool]:
            # A task that gave its pages back meanwhile is unknown to memory by now.
            known = [(t.id, n) for t, n in wants if t.id in memory.tasks and not memory.tasks[t.id].away]
            return memory.grow(known), memory.tiers.low

        def reply(got: tuple[list[tuple[int, list[int]]], bool]) -> None:
            self.core.grown(host, [(*asked[i], pages) for i, pages in got[0]], self.now, got[1])

        def fail(error: LLMOSError) -> None:
            for task, _ in wants:
                task.growing = False
            self.at(self.now + RETRY_SECONDS, lambda: self.core.grown(host, [], self.now))

        self._ask(host, call, reply, fail)

    def free(self, host: Host, tasks: list[Task]) -> None:
        self._tell(host, lambda memory: memory.free([task.id for task in tasks]))

    def commit(self, host: Host, tasks: list[Task]) -> None:
        lines = [(task.id, task.tokens[task.committed :], task.computed) for task in tasks]
        for task in tasks:
            task.committed = len(task.tokens)
        self._tell(host, lambda memory: memory.commit([line for line in lines if line[0] in memory.tasks]))

    def swap_out(self, host: Host, task: Task) -> None:
        residence, swapping = task.residence, self.core.swapping
        self._ask(
            host,
            lambda memory: memory.tiers.swap_out(task.id).message(),
            lambda transfer: swapping.going(host, task, residence, transfer),
            lambda error: swapping.stays(host, task, residence, error, self.now),
        )

    def swap_in(self, host: Host, task: Task, extra: int, spare: int) -> None:
        residence, swapping = task.residence, self.core.swapping
        hurry = host.tiers.hurries(task)

        def call(memory: Arena) -> tuple[list[int], int, Transfer | None]:
            pages, cached = memory.tiers.swap_in(task.id, extra, spare, hurry)
            return pages, cached, _transfer(memory, task)

        self._ask(
            host,
            call,
            lambda got: swapping.coming(host, task, residence, *got, self.now),
            lambda error: swapping.must_wait(host, task, residence, error, self.now),
        )

    def demote(self, host: Host) -> None:
        def call(memory: Arena) -> Transfer:
            transfer = memory.tiers.demote()
            return transfer.message() if transfer else Transfer(0, [])

        def fail(error: LLMOSError) -> None:
            host.tiers.demoting = False

        self._ask(host, call, lambda transfer: self.core.swapping.demotion(host, transfer, self.now), fail)

    def transfer(self, host: Host, transfer: Transfer, done: int = 0) -> None:
        def moved(batch: Batch, answer: Moved | None) -> None:
            if answer is None:
                self._settle(host, transfer, done)
                return
            self.moved_bytes += answer.bytes
            host.tiers.links.observe(batch, answer)
            self.transfer(host, transfer, done + 1)

        if done == len(transfer.batches):
            self._settle(host, transfer, done)
        else:
            batch, device = transfer.batches[done], self._devices[host.arena]
            self.soon(lambda: device.move(batch, lambda answer: moved(batch, answer)))

    def _settle(self, host: Host, transfer: Transfer, done: int) -> None:
        complete, swapping = done == len(transfer.batches), self.core.swapping

        def call(memory: Arena) -> tuple[int, bool]:
            task = memory.tiers.settle(transfer.id, done)
            return task.computed if task else 0, memory.tiers.low

        self._ask(
            host,
            call,
            lambda got: swapping.settled(host, transfer.id, complete, *got, self.now),
            lambda _: swapping.settled(host, transfer.id, False, 0, False, self.now),
        )

    def abort(self, host: Host, transfer: Transfer) -> None:
        if transfer.batches:
            self._tell(host, lambda memory: memory.tiers.settle(transfer.id, 0))

    def teach(self, host: Host, costs: Costs) -> None:
        self._tell(host, lambda memory: memory.tiers.learn(costs))

    def execute(self, host: Host, quantum: Quantum) -> None:
        device = self._devices[host.arena]
        self.soon(lambda: device.submit(quantum))

    def preempt(self, host: Host, quantum: int) -> None:
        device = self._devices[host.arena]
        self.soon(lambda: device.preempt(quantum))

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


class _Device:
    """A driver in simulated time: dispatches a step ahead, and looks for a preempt in between."""

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
        delay = 0.0 if event == self._landed else self._sim._latency
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


def _transfer(memory: Arena, task: Task) -> Transfer | None:
    transfer = memory.tasks[task.id].transfer
    return transfer.message() if transfer else None


def _decodes(seat: _Seat) -> bool:
    return not seat.finished and len(seat.tokens) > seat.known

"""The second step is dispatched as late as the device is never left waiting, whatever kind of driver."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from llmos.drivers.sdk.driver import Driver, Pending, PendingStep
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import Quantum, QuantumDone, Step
from llmos.drivers.sdk.timing import FIRST_MARGIN, MAX_MARGIN, MIN_MARGIN, Timing
from llmos.ipc.errors import LLMOSError

STEP, HOST = 0.012, 0.0015


class Device(Driver):
    """A device in simulated time; a synchronous one computes a step while it is dispatched."""

    def __init__(self, synchronous: bool = False, overlaps: bool = False, tells: bool = False) -> None:
        self.now = self.free_at = 1.0
        self.unused = 0.0
        self.dispatched: list[tuple[int, float]] = []  # quantum, seconds until the step before it ends
        self._synchronous, self._overlaps, self._tells = synchronous, overlaps, tells
        self.step = STEP
        self._random = random.Random(1)

    def clock(self) -> float:
        return self.now

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        for index in range(quantum.steps):
            self.dispatched.append((quantum.id, self.free_at - self.now))
            self.now += STEP if self._synchronous else HOST
            self.unused += max(0.0, self.now - self.free_at)
            self.free_at = max(self.now, self.free_at)
            if not self._synchronous:
                self.free_at += self.step * self._random.uniform(1.0, 1.1)
            result = lambda index=index, ends=self.free_at: self._result(quantum.id, index, ends)  # noqa: E731
            if self._overlaps or self._tells:
                there = lambda ends=self.free_at: self.now >= ends  # noqa: E731
                yield Pending(result, there, overlaps=self._overlaps)
            else:
                yield result

    def _result(self, quantum: int, index: int, ends: float) -> Step:
        self.now = max(self.now, ends) + 1e-5
        return Step(quantum, index, [], [], [], 0)


class Ignore:
    """A sink for results that nobody reads."""

    def step(self, step: Step) -> None: ...
    def done(self, done: QuantumDone) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


def run(device: Device, steps: int) -> Executor:
    """The server's loop: look for messages for as long as there is time, then go on."""
    executor = Executor(device, clock=device.clock)
    executor.submit(Quantum(id=1, model="m", steps=steps), Ignore())
    while len(device.dispatched) < steps:
        if pause := executor.pause():
            device.now += pause
        else:
            executor.advance()
    return executor


def test_the_device_is_idle_for_less_than_two_percent() -> None:
    device = Device()
    run(device, 500)
    assert device.unused / (device.now - 1.0) < 0.02


def test_the_next_step_is_dispatched_in_the_last_quarter_of_the_running_one() -> None:
    device = Device()
    run(device, 300)
    late = [left for _, left in device.dispatched[50:]]
    assert sorted(late)[len(late) // 2] < STEP / 4


def test_steps_that_overlap_on_the_device_are_dispatched_at_once() -> None:
    device = Device(overlaps=True)
    run(device, 50)
    early = [left for _, left in device.dispatched[1:]]
    assert min(early) > STEP - 2 * HOST


def test_what_arrives_while_a_step_runs_is_the_next_step() -> None:
    device = Device()
    executor = run(device, 100)
    while not executor.pause():
        executor.advance()
    executor.submit(Quantum(id=2, model="m", steps=1), Ignore())
    while executor.advance():
        device.now += executor.pause()
    assert device.dispatched[-1][0] == 2
    assert [id for id, _ in device.dispatched].count(1) == 100


def test_a_quantum_of_one_step_is_dispatched_no_earlier_than_a_step_of_a_long_one() -> None:
    device = Device()
    executor = run(device, 100)
    for id in range(2, 40):
        executor.submit(Quantum(id=id, model="m", steps=1), Ignore())
    while len(device.dispatched) < 138:
        if pause := executor.pause():
            device.now += pause
        else:
            executor.advance()
    assert max(left for _, left in device.dispatched[105:]) < STEP / 2


def test_a_driver_that_computes_while_it_dispatches_never_waits() -> None:
    device = Device(synchronous=True)
    executor = run(device, 50)
    before = device.now
    executor.submit(Quantum(id=2, model="m", steps=20), Ignore())
    while executor.advance():
        assert not executor.pause()
    assert device.now - before < 21 * STEP


def test_a_kind_of_step_that_was_never_seen_is_not_waited_for() -> None:
    timing = Timing()
    timing.took("decode", 0.020, 0.001)
    assert timing.pause("prefill", 0.0) == 0.0
    assert timing.pause("decode", 0.0) == pytest.approx(0.020 - FIRST_MARGIN, abs=1.1e-3)
    assert timing.pause("decode", 0.019) == 0.0


def test_a_step_that_was_there_early_took_no_longer_if_it_had_the_device_to_itself() -> None:
    timing = Timing()
    timing.took("decode", 0.020, 0.001)
    timing.took("decode", 0.005, 0.0)
    assert timing.pause("decode", 0.0) > 0.015
    timing.took("decode", 0.005, 0.0, alone=True)
    assert timing.pause("decode", 0.0) == pytest.approx(0.005 - FIRST_MARGIN, abs=1.1e-3)
    timing.took("decode", 0.030, 0.0, alone=True)  # nobody asked for it sooner
    assert timing.pause("decode", 0.0) == pytest.approx(0.005 - FIRST_MARGIN, abs=1.1e-3)


def test_a_step_that_ends_sooner_than_others_like_it_is_not_waited_for() -> None:
    device = Device(tells=True)
    executor, ended = Executor(device, clock=device.clock), []
    sink = Ignore()
    sink.step = lambda step: ended.append(device.now)  # type: ignore[method-assign]
    for number, device.step in enumerate((10 * STEP, STEP)):
        begun = device.now
        executor.submit(Quantum(id=number + 1, model="m", steps=1), sink)
        while len(ended) <= number:
            if pause := executor.pause():
                device.now += pause
            else:
                executor.advance()
    assert ended[1] - begun < 2 * STEP


def test_the_margin_grows_at_once_and_shrinks_slowly_within_its_limits() -> None:
    timing = Timing()
    timing.followed(0.0, held=True)
    grown = timing.margin
    assert grown > FIRST_MARGIN
    timing.followed(0.01, held=True)
    assert FIRST_MARGIN < timing.margin < grown
    for _ in range(1000):
        timing.followed(0.01, held=True)
    assert timing.margin == pytest.approx(MIN_MARGIN, rel=0.05)
    for _ in range(1000):
        timing.followed(0.0, held=True)
    assert timing.margin == MAX_MARGIN


def test_a_device_that_had_nothing_to_do_is_no_reason_to_hurry() -> None:
    timing = Timing()
    timing.followed(0.0, held=False)
    assert timing.margin == FIRST_MARGIN
    device = Device()
    executor = run(device, 1)
    for number in range(2, 200):  # requests of one step, the next after an idle while
        while executor.advance():
            device.now += executor.pause()
        device.now += 0.1
        executor.submit(Quantum(id=number, model="m", steps=1), Ignore())
    assert executor._lane(0)._timing.margin == FIRST_MARGIN

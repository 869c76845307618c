"""What dispatching the second step just in time costs and brings, against dispatching it at once.

    python -m benchmarks.dispatch [--step-ms 12] [--host-ms 1.5] [--steps 3000] [--real] [--json FILE]

The SDK's executor on a simulated device: a step takes ``step-ms`` and up to a tenth more, its dispatch
``host-ms`` of the host and, once in twenty, three times that. Time is simulated, or real with ``--real``.
Reported for each way: the share of time that the device was idle, and how long a quantum that arrives at a
random moment waits for its first step to begin.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from benchmarks.report import Report, arguments
from llmos.drivers.sdk.driver import Driver, PendingStep
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import Quantum, QuantumDone, Step
from llmos.drivers.sdk.timing import Timed
from llmos.ipc.errors import LLMOSError

ARRIVAL_EVERY = 10  # steps


class Clock:
    """Simulated time, in seconds."""

    def __init__(self) -> None:
        self._now = 1.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(1e-6, seconds)


class RealClock(Clock):
    """The machine's."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


class Device(Driver):
    """Computes steps one after the other, as a queue on an accelerator does."""

    def __init__(self, clock: Clock, step: float, host: float) -> None:
        self._clock, self._step, self._host = clock, step, host
        self._random = random.Random(5)
        self._free_at = 0.0
        self.rested = 0.0
        self.began: dict[int, float] = {}

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        for index in range(quantum.steps):
            self._clock.sleep(self._host * (3.0 if self._random.random() < 0.05 else 1.0))
            now = self._clock.now()
            if self._free_at:
                self.rested += max(0.0, now - self._free_at)
            began = max(now, self._free_at)
            self.began.setdefault(quantum.id, began)
            self._free_at = ends = began + self._step * self._random.uniform(1.0, 1.1)
            yield lambda index=index, ends=ends: self._result(quantum.id, index, ends)  # type: ignore[misc]

    def _result(self, quantum: int, index: int, ends: float) -> Step:
        self._clock.sleep(ends - self._clock.now())
        return Step(quantum, index, [], [], [], round(self._step * 1e6))


class Ignore:
    """A sink for results that nobody reads."""

    def step(self, step: Step) -> None: ...
    def done(self, done: QuantumDone) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


def play(options: Any) -> dict[str, float]:
    """Long quanta that are preempted now and then by one that came at a random moment of a step."""
    rng = random.Random(3)
    clock = RealClock() if options.real else Clock()
    device = Device(clock, options.step_ms / 1e3, options.host_ms / 1e3)
    executor = Executor(device, clock=clock.now)
    id, waits, sent = 0, list[float](), dict[int, float]()
    begun = clock.now()
    arrival = begun
    for _ in range(options.steps // ARRIVAL_EVERY):
        id += 1
        executor.submit(Quantum(id=id, model="m", steps=1), Ignore())
        sent[id] = arrival
        id += 1
        executor.submit(Quantum(id=id, model="m", steps=10 * ARRIVAL_EVERY), Ignore())
        arrival = clock.now() + (ARRIVAL_EVERY - 1 + rng.random()) * options.step_ms / 1e3
        while clock.now() < arrival:
            if pause := executor.pause():
                clock.sleep(min(pause, arrival - clock.now()))
            else:
                executor.advance()
        executor.preempt(id)
    spent = clock.now() - begun
    waits = sorted(device.began[i] - at for i, at in sent.items() if i in device.began and i > 1)
    return {
        "idle_share": round(device.rested / spent, 4),
        "wait_p50_ms": round(1e3 * waits[len(waits) // 2], 2),
        "wait_max_ms": round(1e3 * waits[-1], 2),
    }


def at_once(options: Any) -> dict[str, float]:
    """The same with nothing held back."""
    with mock.patch.object(Timed, "pause", return_value=0.0):
        return play(options)


def main() -> None:
    """Both ways, on the same traffic."""
    parser = arguments("The second step at once, or just in time.")
    parser.add_argument("--step-ms", type=float, default=12.0)
    parser.add_argument("--host-ms", type=float, default=1.5, help="host time of a dispatch")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--real", action="store_true", help="in real time, which wants a quiet machine")
    options = parser.parse_args()
    ways = {"at once": at_once(options), "just in time": play(options)}
    Report("dispatch", ways).write(options.json)


if __name__ == "__main__":
    main()

"""A discrete-event simulator: the real core and the real memory policy against a model of the device's time.

Weeks of traffic run in seconds, and a policy is compared with others on the same trace. Nothing is mocked
but time: messages take ``latency`` seconds, steps take what ``StepTime`` says, the second is dispatched
shortly before the first ends as in the driver SDK, and tokens are those of the null driver, so that every
task's output can be checked. With a ``burst`` a step gives a task up to so many tokens, as a driver that
speculates. Moves between tiers take what ``LinkTime`` says, one after the other in each direction, while
steps go on; they are ordered with quanta as the driver SDK does it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmos.drivers.sdk.messages import LoadedModel, Quantum
from llmos.ipc.errors import LLMOSError
from llmos.services.memory.arenas import Arenas
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.effects import arena_of, holdings
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.simulated_cache import LinkTime
from llmos.services.scheduler.simulated_device import Device, Lane
from llmos.services.scheduler.simulated_memory import MemoryCalls
from llmos.services.scheduler.task import Task


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: ``base``, plus for each decoding row, each token of context read, each prefilled
    token. The defaults are a 8B model in bfloat16 on one H200.

    With a ``kink`` the products of so many tokens, rows and prompts together, are hidden behind the reading
    of the weights, and each token beyond costs ``prefill``."""

    base: float = 4.6e-3
    row: float = 7.0e-6
    context: float = 4.2e-8
    prefill: float = 2.1e-5
    kink: int = 0

    def of(self, rows: int, context: int, prefilled: int) -> float:
        shown = max(0, rows + prefilled - self.kink) if self.kink else prefilled
        return self.base + self.row * rows + self.context * context + self.prefill * shown


@dataclass(frozen=True)
class Jitter:
    """By how much steps differ that should not: each takes up to ``spread`` of its time less or more, and up
    to ``late`` seconds more; one in so many ``stalls`` is longer by a uniform part of ``stall`` seconds."""

    spread: float = 0.0
    late: float = 0.0
    stalls: int = 0
    stall: float = 0.0
    seed: int = 1


class Jittery:
    """A random sequence of what steps take."""

    def __init__(self, jitter: Jitter) -> None:
        self._jitter = jitter
        self._random = random.Random(jitter.seed)

    def of(self, seconds: float) -> float:
        jitter, uniform = self._jitter, self._random.uniform
        seconds *= 1.0 + uniform(-jitter.spread, jitter.spread)
        stalled = jitter.stalls and not self._random.randrange(jitter.stalls)
        return seconds + uniform(0.0, jitter.late) + (uniform(0.0, jitter.stall) if stalled else 0.0)


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


class Simulator(MemoryCalls):
    """One model on one device, or on ``hosts`` of them, or several on each with ``beside``, in what pools
    they say. Feed it with ``submit`` at any time, then ``run``. Unless a driver ``tells`` how far the quanta
    came that are taken back, they are waited for. ``checked`` asserts that every sequence finds its own KV in
    its pages."""

    def __init__(
        self,
        model: LoadedModel,
        step_time: StepTime,
        *,
        max_steps: int = 8,
        latency: float = 2.5e-4,
        hosts: int = 1,
        burst: int = 1,
        tells: bool = True,
        make_core: Callable[[Simulator, int], Core] = Core,
        link_time: LinkTime | None = None,
        jitter: Jitter = Jitter(),
        checked: bool = False,
        beside: Iterable[tuple[LoadedModel, StepTime]] = (),
    ) -> None:
        super().__init__(latency)
        self.records: dict[int, Record] = {}
        self.busy = 0.0
        self.core = make_core(self, max_steps)
        models = {model.model: (model, step_time)} | {each.model: (each, time) for each, time in beside}
        self._step_times = {name: time for name, (_, time) in models.items()}
        self.link_time = link_time or LinkTime()
        self._jittery = Jittery(jitter)
        self.checked = checked
        self.moved_bytes = self.prefilled = 0
        self.burst = burst
        self.tells = tells
        self.hosts = [Host(f"sim{i}", each) for i in range(hosts) for each, _ in models.values()]
        self.host = self.hosts[0]
        self.arenas = Arenas()
        self.memories = {host.arena: self.arenas.declare(arena_of(host)) for host in self.hosts}
        self.memory = self.memories[self.host.arena]
        lanes = {host.driver: Lane() for host in self.hosts}
        self.devices = {host.arena: Device(self, host, lanes[host.driver]) for host in self.hosts}
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

    def fail_move(self) -> None:
        """Let the next move on the first host fail."""
        self.devices[self.host.arena].fail_moves += 1

    def restart_driver(self) -> None:
        """The first host's driver dies and is there again: its pages and what it was doing are gone."""
        old = self.host
        self.core.lose_host(old, self.now)
        self.devices[old.arena].dead = True
        self.host = self.hosts[0] = Host(old.driver, old.model)
        self.devices[old.arena] = Device(self, self.host)
        self.memory = self.memories[old.arena] = self.arenas.declare(arena_of(self.host))
        self.core.add_host(self.host, self.now)

    def restart_memory(self) -> None:
        """Memory dies and is told at once what is held; calls that were on their way are lost."""
        seated = [(host, task) for host in self.hosts for task in self.core.swapping.memory_lost(host)]
        self.arenas = Arenas()
        for host in self.hosts:
            self.memories[host.arena] = self.arenas.restore(holdings(self.core, host))
        self.memory = self.memories[self.host.arena]
        for host, task in seated:
            self.core.paging.reserve(host, task)

    # --- the core's effects; those on memory and tiers are in ``MemoryCalls`` ---

    def execute(self, host: Host, quantum: Quantum) -> None:
        device = self.devices[host.arena]
        self.soon(lambda: device.submit(quantum))

    def preempt(self, host: Host, quantum: int) -> None:
        device = self.devices[host.arena]
        self.soon(lambda: device.preempt(quantum))

    def emit(self, produced: list[Produced]) -> None:
        for item in produced:
            self.records[item.task.id].times += [self.now] * len(item.tokens)

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        record = self.records[task.id]
        record.ended, record.reason, record.error = self.now, reason, error

    def step_seconds(self, host: Host, rows: int, context: int, prefilled: int) -> float:
        return self._jittery.of(self._step_times[host.model.model].of(rows, context, prefilled))

"""What the scheduler's decisions cost with 256 running and 10,000 waiting tasks: at most 2 ms a quantum."""

from __future__ import annotations

import itertools

from pytest_benchmark.fixture import BenchmarkFixture

from llmos.drivers.sdk.messages import LoadedModel, Quantum, QuantumDone, Step
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.compose import compose
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task

RUNNING, WAITING, STEPS = 256, 10_000, 8
PROMPT, LIMIT = 64, 1 << 20
PAGE = 16


class Effects:
    """Memory that always has pages, and a driver whose quanta are kept here."""

    def __init__(self) -> None:
        self.core: Core | None = None
        self.quanta: list[Quantum] = []
        self._pages = itertools.count()

    def take(self, count: int) -> list[int]:
        return [next(self._pages) for _ in range(count)]

    def execute(self, host: Host, quantum: Quantum) -> None:
        self.quanta.append(quantum)

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


def crowded() -> tuple[Core, Host, Effects]:
    """A host that has been given everything: 256 tasks decode, 10,000 of 50 tenants in all bands wait."""
    effects = Effects()
    core = Core(effects, STEPS)  # type: ignore[arg-type]
    model = LoadedModel(
        model="m", family="null", parameters=0, weight_bytes=0, pages=1 << 22, page_tokens=PAGE, page_bytes=1,
        slots=RUNNING, max_context=LIMIT, chunk_tokens=RUNNING * PROMPT, vocab_size=256, stop_tokens=[],
        attention="none",
    )  # fmt: skip
    host = Host("d", model)
    core.add_host(host, 0.0)
    running = [task(id, band=0) for id in range(RUNNING)]
    for each in running:
        core.submit(each, 0.0)
        core.paging.reserved(host, each, effects.take(1000), 0, 0.0)
    for id in range(RUNNING, RUNNING + WAITING):
        core.submit(task(id, band=1 + id % 2), 1.0)
    while len(effects.quanta) < 4 or effects.quanta[-1].start or effects.quanta[-1].chunks:
        turn(core, host, effects)
    return core, host, effects


def task(id: int, band: int) -> Task:
    tenant = f"t{id % 50}"
    return Task(id, tenant, tenant, "m", BANDS[band], [id % 256] * PROMPT, PROMPT, LIMIT, 0.001 * id)


def turn(core: Core, host: Host, effects: Effects) -> None:
    """The driver executes the oldest quantum, and the core makes up the next one."""
    quantum = host.flight[0].quantum
    # A step in which chunks are complete gives those slots a token, too.
    last = {chunk.slot: chunk for chunk in quantum.chunks}
    for index in range(quantum.steps):
        slots = [s for s in quantum.decode if s not in last or last[s].step <= index]
        core.step(host, Step(quantum.id, index, slots, [1] * len(slots), [], 10_000), 2.0)
    core.done(host, QuantumDone(quantum.id, quantum.steps, False), 2.0)


def test_a_quantum_is_composed(benchmark: BenchmarkFixture) -> None:
    _, host, _ = crowded()
    ids = itertools.count(1 << 20)

    def setup() -> tuple[tuple[Host, int, int, float], dict[str, object]]:
        for each in host.running:  # as it was before the last one was composed
            each.planned = len(each.tokens)
        return (host, next(ids), STEPS, 2.0), {}

    quantum = benchmark.pedantic(compose, setup=setup, rounds=200)
    assert len(quantum.decode) == RUNNING
    assert quantum.steps == STEPS


def test_a_quantum_is_received_and_the_next_one_sent(benchmark: BenchmarkFixture) -> None:
    """All of it: eight steps of 256 tokens recorded, the queue looked at, the next quantum composed."""
    core, host, effects = crowded()
    before = len(effects.quanta)
    benchmark.pedantic(turn, (core, host, effects), rounds=100)
    assert len(effects.quanta) >= before + 100


def test_a_step_of_256_tokens_is_recorded(benchmark: BenchmarkFixture) -> None:
    core, host, _ = crowded()
    quantum = host.flight[0].quantum
    step = Step(quantum.id, 0, quantum.decode, [1] * RUNNING, [], 10_000)
    benchmark.pedantic(lambda: core.step(host, step, 2.0), rounds=200)


def test_a_task_is_submitted_behind_10000_others(benchmark: BenchmarkFixture) -> None:
    core, _, _ = crowded()
    ids = itertools.count(1 << 20)
    benchmark.pedantic(lambda: core.submit(task(next(ids), band=1), 3.0), rounds=200)

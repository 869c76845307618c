"""What is kept up to date about the slots is what counting them anew would find."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llmos.ipc.errors import Canceled, LLMOSError
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.rows import Rows, age
from llmos.services.scheduler.seating import AT_ONCE
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.traffic import model, task

SMALL = StepTime(base=1e-3)


def counted(host: Host) -> dict[str, list[int]]:
    """The interactive tasks of each tenant, the oldest first."""
    found: dict[str, list[Task]] = {}
    for each in host.running:
        if each.rank == 1:
            found.setdefault(each.tenant, []).append(each)
    return {name: [t.id for t in sorted(mine, key=age)] for name, mine in found.items()}


def check_hosts(sim: Simulator) -> None:
    for host in sim.hosts:
        assert {name: [t.id for t in mine] for name, mine in host.rows.items()} == counted(host)
        assert set(host.unstarted) == {t.id for t in host.running if t.place is not Place.RUNNING}
        assert host.tenants == Counter(t.tenant for t in host.running)


def meddle(sim: Simulator, made: list[Task], rng: random.Random) -> None:
    """Someone is killed, stopped for a while, or moved to another band."""
    chosen = [each for each in made if each.id in sim.core.tasks]
    if not chosen:
        return
    each = rng.choice(chosen)
    try:
        match rng.randrange(3):
            case 0:
                sim.core.kill(each, Canceled("the test withdrew it"), sim.now)
            case 1:
                sim.core.stop(each, sim.now)
                sim.at(sim.now + 0.1, lambda: sim.core.cont(each, sim.now))
            case _:
                sim.core.nice(each, rng.choice(BANDS), sim.now)
    except LLMOSError:
        pass


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_the_slots_at_all_times(seed: int) -> None:
    rng = random.Random(seed)
    sim = Simulator(model(slots=8, pages=rng.choice((60, 400))), SMALL, hosts=1 + seed % 2)
    made = [
        task(i, [i % 256] * rng.randint(1, 30), rng.randint(1, 60), rng.uniform(0, 1.5), rng.randrange(3),
             tenant=f"t{rng.choice((0, 0, 0, 1, 2, 3))}")
        for i in range(150)
    ]  # fmt: skip
    sim.submit(made)
    for tick in range(400):
        sim.at(tick * 0.01, lambda: check_hosts(sim))
        if tick % 5 == 0:
            sim.at(tick * 0.01, lambda: meddle(sim, made, rng))
    sim.run()
    assert not any(dict(host.rows.items()) or host.unstarted for host in sim.hosts)


def test_a_task_that_never_came_leaves_nothing_behind() -> None:
    rows = Rows()
    here, stranger = task(1, [1], 1, tenant="a"), task(2, [1], 1, tenant="a")
    rows.enter(here)
    rows.leave(stranger)
    assert rows.count("a") == 1
    rows.leave(here)
    assert not dict(rows.items())


def test_no_decision_seats_more_than_some_and_all_are_served() -> None:
    """Tasks of equal length end together, and as many wait for their slots."""
    slots = 4 * AT_ONCE
    sim = Simulator(model(slots=slots, pages=16 * slots, chunk_tokens=slots), SMALL)
    sim.submit([task(i, [i % 256], 40, tenant=f"t{i % 7}") for i in range(3 * slots)])
    queue, turns = sim.core.queues["m"], list[int]()
    admit = sim.core.seating.admit

    def counted_admit(model: str, now: float) -> None:
        before = len(queue)
        admit(model, now)
        turns.append(before - len(queue))

    sim.core.seating.admit = counted_admit  # type: ignore[method-assign]
    sim.run()
    assert max(turns) == AT_ONCE
    assert all(record.reason == "length" for record in sim.records.values())

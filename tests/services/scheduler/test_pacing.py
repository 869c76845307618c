"""Prompts wait for those whose deadlines are near: no newcomer is refused for a moment's sake."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from llmos.services.scheduler.forecast import Job, Machine, finish_times
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.pacing import SHARE, Paces, finest
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.traffic import model, task

BASE, EACH = 0.010, 1e-5


def host() -> Host:
    """Steps of 10 ms and 10 us for each prompt token; chunks of up to 1,024 tokens."""
    made = Host("h", model(slots=8, pages=1000, page_tokens=16, chunk_tokens=1024))
    for prefilled in (0, 64, 512, 1024):
        for _ in range(8):
            made.times.observe(1, 0, prefilled, BASE + EACH * prefilled)
    return made


def decoding(host: Host, id: int, deadline: float, left: int) -> Task:
    one = task(id, [1], left, band=0)
    one.deadline, one.place, one.planned = deadline, Place.RUNNING, 1
    host.promised[id] = one
    return one


def due(deadline: float) -> Task:
    one = task(99, [1] * 500, 10, band=0)
    one.deadline = deadline
    return one


def test_nothing_is_cut_where_nobody_was_promised_anything() -> None:
    free = host()
    assert Paces(free, [task(1, [1], 10, band=0)], 0.0).room(due(1.0)) == 1024


def test_a_prompt_takes_what_the_nearest_earlier_deadline_leaves() -> None:
    tight = host()
    tasks = [decoding(tight, 1, 1.0, 65), decoding(tight, 2, 5.0, 10)]
    room = Paces(tight, tasks, 0.0).room(due(2.0))
    # 65 steps in a second, 15 ms each: 5 ms for a prompt, less what is held in reserve.
    assert room == pytest.approx((SHARE / 65 - BASE) / EACH, rel=0.15)
    assert Paces(tight, tasks, 0.0).room(due(0.5)) == 1024, "whoever is due sooner is not held up"


def test_a_prompt_waits_where_hardly_anything_is_left() -> None:
    tight = host()
    tasks = [decoding(tight, 1, 1.0, 90)]
    assert Paces(tight, tasks, 0.0).room(due(2.0)) == 0
    assert finest(tight) == 64


@pytest.mark.parametrize(
    ("page", "least", "smallest"), [(16, 0, 64), (128, 0, 128), (16, 256, 256), (16, 4096, 1024)]
)
def test_no_chunk_is_smaller_than_what_takes_as_long(page: int, least: int, smallest: int) -> None:
    cut = host()
    cut.model = replace(cut.model, page_tokens=page, least_chunk=least)
    assert finest(cut) == smallest


def test_nobody_waits_for_the_sake_of_one_who_will_be_late_all_the_same() -> None:
    tight = host()
    assert Paces(tight, [decoding(tight, 1, 0.5, 90)], 0.0).room(due(2.0)) == 1024


def test_the_forecast_lets_a_prompt_wait_for_an_earlier_deadline() -> None:
    def chunk(rows: float, context: float, seconds: float) -> int:
        return min(100, max(0, int((seconds - 0.01) / 0.0001))) if seconds < 1e9 else 100

    machine = Machine(lambda rows, context, prefilled: 0.01 + 0.0001 * prefilled, chunk, slots=4, pages=100)
    near, far = Job(1, 0.11, 0, 10, 10, 1), Job(2, 1.0, 400, 5, 10, 1)
    done = finish_times([near, far], machine, 0.0)
    assert done[1] <= near.deadline
    assert done[2] <= far.deadline


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("batch", [0, 96])
@pytest.mark.parametrize("kink", [0, 220])
def test_of_a_burst_nobody_admitted_is_late(seed: int, batch: int, kink: int) -> None:
    """Prompts that are computed in steps of the same quantum wait for who decodes in these by then; and on a
    device with nothing to do the first of a burst decodes before the others have their pages."""
    rng = random.Random(seed)
    sim = Simulator(model(slots=64, pages=8192, page_tokens=16, chunk_tokens=2048), StepTime(kink=kink))
    made = [
        task(0, [1] * 300, 80, band=2),
        *[task(1 + i, [i % 256] * 512, 300, band=2) for i in range(batch)],
    ]
    at = 3.0
    for _ in range(8):
        for _ in range(rng.randint(1, 32)):
            made.append(task(len(made), [len(made) % 256] * 256, 32, at, band=0, tenant="v"))
            made[-1].deadline = at + rng.uniform(0.15, 2.2)
        at += rng.expovariate(1.5)
    sim.submit(made)
    sim.run()
    records = [sim.records[each.id] for each in made if each.deadline]
    admitted = [record for record in records if record.error is None]
    assert len(admitted) > 20
    assert all(record.in_time for record in admitted)

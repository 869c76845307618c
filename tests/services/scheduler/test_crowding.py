"""A busy host does not promise everything it could keep."""

from __future__ import annotations

import pytest

from llmos.services.scheduler.crowding import QUEUE, TOLERANCE, balanced, crowd
from llmos.services.scheduler.forecast import Job
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task
from tests.services.scheduler.traffic import model, task

BASE, EACH = 0.010, 1e-5
SLOTS = 8


def host(promised: int) -> Host:
    """Steps of 10 ms and 10 us for each prompt token; so many promises, due after 1, 2, 3 ... seconds."""
    made = Host("h", model(slots=SLOTS, pages=1000, page_tokens=16, chunk_tokens=1024))
    for prefilled in (0, 64, 512, 1024):
        for _ in range(8):
            made.times.observe(1, 0, prefilled, BASE + EACH * prefilled)
    made.promised = {id: due(id, id + 1.0) for id in range(promised)}
    return made


def due(id: int, deadline: float) -> Task:
    """500 tokens of prompt, 50 to produce: 10 prompt tokens for each."""
    made = task(id, [1] * 500, 50, band=0)
    made.deadline = deadline
    return made


def job(decode: int = 50) -> Job:
    return Job(99, 0.0, 500, decode, 500, 35)


def test_a_host_that_is_not_half_full_promises_what_it_can_keep() -> None:
    assert crowd(host(SLOTS // 2 - 1), due(99, 0.1)).soonest(job(), 0.0) == 0.0


def test_in_the_balanced_step_as_many_prompt_tokens_are_computed_as_tasks_bring_in() -> None:
    tasks = [due(id, 1.0) for id in range(4)]
    assert balanced(host(0), tasks) == pytest.approx(BASE + EACH * 4 * 10, rel=0.05)
    assert balanced(host(0), tasks * 10) == pytest.approx(BASE + EACH * SLOTS * 10, rel=0.05)


def test_a_busy_host_promises_no_pace_far_above_the_balanced_one() -> None:
    busy = host(SLOTS // 2)
    step = balanced(busy, [*busy.promised.values(), due(99, 0.1)])
    own = crowd(busy, due(99, 0.1)).soonest(job(), 0.0)
    assert own == pytest.approx(TOLERANCE * step * 50 + 500 * EACH, rel=0.05)


def test_beyond_so_many_promises_only_who_is_due_after_all_of_them_gets_one() -> None:
    count = SLOTS + QUEUE
    assert crowd(host(count - 1), due(99, 0.1)).soonest(job(), 0.0) < count
    assert crowd(host(count), due(99, 0.1)).soonest(job(), 0.0) == count

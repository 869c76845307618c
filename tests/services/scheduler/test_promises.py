"""What is promised counts what is on the device already."""

from __future__ import annotations

import pytest

from llmos.drivers.sdk.messages import Chunk, Quantum
from llmos.services.scheduler import promises
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.pacing import MESSAGES
from llmos.services.scheduler.task import Place
from tests.services.scheduler.traffic import model, task

BASE, EACH = 0.010, 1e-5


def host(*quanta: Quantum) -> Host:
    """Steps of 10 ms and 10 us for each prompt token, with these quanta in flight."""
    made = Host("h", model(slots=8, pages=1000, page_tokens=16, chunk_tokens=1024))
    for _ in range(20):
        for prefilled in (0, 64, 512, 1024):
            made.times.observe(1, 0, prefilled, BASE + EACH * prefilled)
    for quantum in quanta:
        made.sent(quantum)
    return made


def prompts(id: int, steps: int, *lengths: int) -> Quantum:
    """A quantum whose first step computes so many tokens of as many prompts."""
    chunks = [Chunk(0, slot, 0, length) for slot, length in enumerate(lengths)]
    return Quantum(id=id, model="m", steps=steps, chunks=chunks)


def lag(host: Host) -> float:
    return promises._lag(host) - MESSAGES


@pytest.mark.parametrize(
    ("quanta", "seconds"),
    [
        ([], 0.0),
        ([prompts(1, 8)], 2 * BASE),
        ([prompts(1, 1, 400, 400, 200)], BASE + 1000 * EACH),
        ([prompts(1, 1, 400, 400, 200), prompts(2, 8)], 2 * BASE + 1000 * EACH),
        ([prompts(1, 2), prompts(2, 8, 500)], 2 * BASE),
    ],
)
def test_a_quantum_begins_after_all_prompts_of_the_steps_that_cannot_be_taken_back(
    quanta: list[Quantum], seconds: float
) -> None:
    assert lag(host(*quanta)) == pytest.approx(seconds * (1.0 + 0.02), rel=0.02, abs=1e-9)


def test_the_newest_of_a_burst_may_be_later_and_on_an_idle_device_all_but_the_first() -> None:
    idle, busy = host(), host(prompts(1, 8))
    burst = [task(id, [1] * 10, 10, band=0) for id in range(4)]
    for one in burst[:3]:
        one.place, one.slot, one.started_at = Place.RESERVING, one.id, 1.0 + one.id
    tasks = [burst[3], *burst[:3]]

    def later(host: Host, tasks: list[int]) -> list[int]:
        chosen = [burst[id] for id in tasks]
        jobs = promises._one_by_one(host, chosen, promises._jobs(host, chosen))
        return [job.id for job in jobs if job.later]

    assert later(busy, [one.id for one in tasks]) == [3]
    assert later(idle, [one.id for one in tasks]) == [3, 1, 2]
    assert later(idle, [3]) == [], "alone it is the first"
    burst[0].place = Place.RUNNING
    assert later(busy, [3, 0]) == [], "nobody else is on the way"

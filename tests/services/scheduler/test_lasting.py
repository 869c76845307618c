"""Memory that is short: tasks are seated to last, and mixes of any sizes get on."""

from __future__ import annotations

import random

import pytest

from llmos.services.memory.invariants import check_all
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.lasting import KEEP, Room, due_back, room, stake
from llmos.services.scheduler.simulator import StepTime
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.test_lending import DEAR, SLABS, TIME, model, run, simulator, task

PAGE, CHUNK = 4, 16


def host(prefill: float) -> Host:
    """A host that knows its steps: a millisecond, and so much for each prompt token."""
    made = Host("sim0", model("a"))
    for rows in (1, 2, 4):
        for tokens in (0, 8, CHUNK):
            made.times.observe(rows, 0, tokens, 1e-3 + prefill * tokens)
    return made


def seated(at: Host, id: int, tokens: int, limit: int, pages: int) -> Task:
    made = task(id, "a", tokens, limit - tokens)
    at.seat(made)
    at.begin(made, list(range(100 * id, 100 * id + pages)), 0)
    made.place = Place.RUNNING
    return made


def test_nothing_is_asked_for_before_steps_are_known() -> None:
    assert room(Host("sim0", model("a")), [], task(1, "a", 40, 40), 8) == Room()


def test_what_a_task_has_at_stake_is_what_its_tokens_take_in_whole_chunks() -> None:
    at, made = host(1e-3), task(1, "a", 48, 40)
    assert stake(at, made) == pytest.approx(3 * at.times.seconds(0, 0, CHUNK))
    made.housed_at = 5.0
    assert due_back(at, made) == pytest.approx(5.0 + KEEP * stake(at, made))


def test_room_is_for_all_who_are_as_urgent_and_grow_meanwhile() -> None:
    at = host(1e-1)  # so dear that it has to last to its end
    seated(at, 1, 40, 48, 10)  # ends after 8 tokens: two pages more
    lower = seated(at, 2, 40, 200, 10)
    lower.band = "batch"
    coming = task(3, "a", 40, 40)
    extra = 8
    assert room(at, [], coming, extra) == Room((40 - extra) // PAGE + 2, 0)
    lower.band = "interactive"
    assert room(at, [], coming, extra).spare > (40 - extra) // PAGE + 2


def test_what_neighbours_need_counts_in_whole_slabs() -> None:
    at, beside = host(1e-1), host(1e-1)
    seated(beside, 1, 40, 48, 10)
    assert room(at, [beside], task(3, "a", 40, 8), 8) == Room(0, at.model.slab_pages)


def mixed(seed: int, bands: int) -> list[Task]:
    """Sixty tasks of three models at once, each of any size up to the whole pool."""
    rng, made = random.Random(seed), list[Task]()
    for id in range(60):
        size = SLABS * 4 * PAGE
        prompt = rng.randint(1, size // 2)
        count = rng.randint(1, size - prompt)
        name = rng.choices("abc", (6, 3, 1))[0]
        made.append(task(id, name, prompt, count, rng.uniform(0, 1.0), rng.randrange(bands)))
    return made


def alone(made: list[Task], time: StepTime) -> float:
    """Seconds that these tasks take one after the other."""
    return sum(
        (each.limit - each.prompt) * time.base
        + -(-each.prompt // CHUNK) * time.base
        + each.prompt * time.prefill
        for each in made
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("time", "bands", "most"), [(TIME, 1, 0.9), (TIME, 3, 1.1), (DEAR, 1, 2.0)])
def test_mixes_up_to_the_whole_pool_come_to_an_end_as_one_after_the_other_would(
    seed: int, time: StepTime, bands: int, most: float
) -> None:
    sim = simulator(*(model(name, pages) for name, pages in zip("abc", (7, 4, 9), strict=True)), time=time)
    made = mixed(seed, bands)
    expected = alone(made, time)
    for tick in range(100):
        sim.at(tick * 0.05, lambda: check_all(sim.arenas))
    run(sim, made)
    ended = max(record.ended for record in sim.records.values())
    assert ended < most * expected

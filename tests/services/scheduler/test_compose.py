"""How much of a prompt one step may compute, for the sake of those who decode and of those who may come."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from llmos.services.scheduler.compose import ALERT, PATIENCE, compose, decode_room
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.traffic import model, task

NOW = 100.0


@pytest.fixture
def host() -> Host:
    """Steps of 10 ms and 50 us for each prompt token; chunks of up to 2,048 tokens."""
    made = Host("h", model(slots=8, pages=1000, page_tokens=16, chunk_tokens=2048))
    for prefilled in (0, 64, 512, 2048):
        for _ in range(8):
            made.times.observe(1, 0, prefilled, 0.010 + 5e-5 * prefilled)
    return made


def starting(host: Host, band: int) -> Task:
    """A task that starts in the next quantum, with a prompt of 64 tokens."""
    one = task(7, [1] * 64, 10, band=band)
    one.slot, one.place, one.base = 0, Place.READY, 64
    host.slots[0] = one
    host.starting = [one]
    return one


def test_batch_work_alone_prefills_in_large_steps(host: Host) -> None:
    assert decode_room(host, [task(1, [1], 10, band=2)], NOW) == (2, 2048)
    assert decode_room(host, [], NOW) == (2, 2048)


@pytest.mark.parametrize(("band", "room"), [(0, 128), (1, 1024)], ids=["realtime", "interactive"])
def test_steps_stay_short_for_a_while_after_somebody_urgent_has_come(
    host: Host, band: int, room: int
) -> None:
    starting(host, band)
    compose(host, 1, 8, NOW)
    batch = [task(1, [1], 10, band=2)]
    assert decode_room(host, batch, NOW + 0.9 * ALERT) == (band, room)
    assert decode_room(host, [], NOW + 0.9 * ALERT) == (band, room), (
        "the next one waits for prompts alone, too"
    )
    assert decode_room(host, batch, NOW + 1.1 * ALERT) == (2, 2048)


def test_a_first_token_does_not_wait_for_the_prompts_of_a_lower_band(host: Host) -> None:
    for id, band in enumerate((2, 1, 1)):
        one = task(id, [1] * 64, 10, band=band)
        one.slot, one.place, one.base = id, Place.RUNNING, 64
        host.slots[id] = one
    quantum = compose(host, 1, 8, NOW)
    assert quantum is not None
    assert [(chunk.step, chunk.slot) for chunk in quantum.chunks] == [(0, 1), (0, 2), (1, 0)]


def beside_prompts(host: Host, prompts: int, band: int = 2) -> Task:
    """A task that decodes, and so many that have prompts of 512 tokens to compute."""
    for slot in range(prompts + 1):
        one = task(slot, [1] * 512, 600, band=2 if slot else band)
        one.slot, one.place, one.base, one.planned = slot, Place.RUNNING, 512, 512
        one.prefilled, one.pages = 0 if slot else 512, list(range(40))
        host.slots[slot] = one
    decoding = host.slots[0]
    assert decoding is not None
    return decoding


def test_batch_tasks_wait_for_prompts_that_fill_a_step(host: Host) -> None:
    host.decoded = NOW
    decoding = beside_prompts(host, prompts=5)
    quantum = compose(host, 1, 8, NOW)
    assert quantum is not None
    assert (quantum.steps, [chunk.slot for chunk in quantum.chunks]) == (1, [1, 2, 3, 4])
    assert 0 not in quantum.decode
    assert decoding.planned == 512, "nothing is expected of it"
    quantum = compose(host, 2, 8, NOW)
    assert quantum is not None
    assert sorted(quantum.decode) == [0, 1, 2, 3, 4, 5], "the last prompt does not fill a step"


@pytest.mark.parametrize("case", ["few", "interactive", "small chunks", "for too long"])
def test_else_they_decode_beside_prompts(host: Host, case: str) -> None:
    beside_prompts(host, prompts=3 if case == "few" else 4, band=1 if case == "interactive" else 2)
    host.decoded = NOW - (PATIENCE if case == "for too long" else 0)
    if case == "small chunks":
        host.model = replace(host.model, chunk_tokens=1024)
    quantum = compose(host, 1, 8, NOW)
    assert quantum is not None
    assert 0 in quantum.decode


def test_what_was_taken_back_is_planned_anew_behind_what_was_dispatched(host: Host) -> None:
    decoding, prompt = task(1, [1] * 4, 40, band=2), task(2, [1] * 3000, 10, band=2)
    for slot, one in enumerate((decoding, prompt)):
        one.slot, one.place, one.base, one.pages = slot, Place.RUNNING, len(one.tokens), list(range(200))
        host.slots[slot] = one
    decoding.prefilled = decoding.computed = decoding.planned = 4
    host.ready = True
    first, second = compose(host, 1, 8, NOW), None
    assert first is not None
    host.sent(first)
    assert [chunk.length for chunk in first.chunks] == [2048, 952]
    assert (first.steps, decoding.planned, prompt.prefilled) == (2, 6, 3000)
    second = compose(host, 2, 8, NOW)
    assert second is not None
    host.sent(second)
    host.draining = True
    assert (second.steps, decoding.planned, host.can_compose) == (8, 14, False)
    host.cut({1: 1, 2: 0})
    assert (decoding.planned, prompt.prefilled) == (5, 2048)
    assert host.busy
    assert host.can_compose
    third = compose(host, 3, 8, NOW)
    assert third is not None
    assert [(chunk.start, chunk.length) for chunk in third.chunks] == [(2048, 952)]
    assert 0 in third.decode

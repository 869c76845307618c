"""The scheduler's core under any traffic, in simulated time: right tokens, no page lost, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.null.driver import next_token
from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import Canceled
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Task


def model(slots: int = 4, pages: int = 64, page_tokens: int = 4, chunk_tokens: int = 16) -> LoadedModel:
    return LoadedModel(
        model="m",
        family="null",
        parameters=0,
        weight_bytes=0,
        pages=pages,
        page_tokens=page_tokens,
        page_bytes=1,
        slots=slots,
        max_context=pages * page_tokens,
        chunk_tokens=chunk_tokens,
        vocab_size=256,
        stop_tokens=[],
        attention="none",
    )


def task(
    id: int, prompt: list[int], count: int, arrived: float = 0.0, band: int = 1, tenant: str = "a"
) -> Task:
    return Task(id, tenant, tenant, "m", BANDS[band], list(prompt), len(prompt), len(prompt) + count, arrived)


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


def check_all(sim: Simulator, tasks: list[Task], prompts: dict[int, list[int]]) -> None:
    for each in tasks:
        record = sim.records[each.id]
        assert record.reason == "length", f"task {each.id} ended by {record.reason} {record.error}"
        assert each.tokens == expected(prompts[each.id], each.limit - each.prompt)
        assert len(record.times) == each.produced, "a token was lost or sent twice"
    usage = sim.memory.usage()
    assert usage.owned == 0
    assert usage.free + usage.cached == usage.total


tasks = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt
        st.integers(1, 60),  # output
        st.floats(0, 0.5),  # arrival
        st.integers(0, 2),  # band
        st.sampled_from(["a", "b", "c"]),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(tasks, st.integers(1, 6), st.integers(30, 80), st.integers(1, 9))
def test_any_traffic_ends_with_the_right_tokens_and_all_pages_back(
    traffic: list[tuple[int, int, float, int, str]], slots: int, pages: int, steps: int
) -> None:
    sim = Simulator(model(slots, pages), StepTime(), max_steps=steps)
    made = [
        task(i, [(i * 7 + j // 9) % 256 for j in range(p)], n, t, band, tenant)
        for i, (p, n, t, band, tenant) in enumerate(traffic)
    ]
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    sim.run()
    check_all(sim, made, prompts)


@settings(deadline=None, max_examples=40)
@given(tasks, st.lists(st.tuples(st.integers(0, 39), st.floats(0, 1)), max_size=20))
def test_tasks_may_be_killed_at_any_time(
    traffic: list[tuple[int, int, float, int, str]], kills: list[tuple[int, float]]
) -> None:
    sim = Simulator(model(3, 40), StepTime())
    made = [task(i, [i] * p, n, t, band, tenant) for i, (p, n, t, band, tenant) in enumerate(traffic)]
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    victims = {made[i] for i, _ in kills if i < len(made)}
    for index, time in kills:
        if index < len(made):
            victim = made[index]
            sim.at(
                max(time, victim.arrived + 1e-9),
                lambda v=victim: sim.core.kill(v, Canceled("killed"), sim.now),
            )  # type: ignore[misc]
    sim.run()
    check_all(sim, [each for each in made if each not in victims], prompts)


def test_a_waiting_task_of_a_higher_band_starts_within_a_few_steps() -> None:
    sim = Simulator(model(slots=2, pages=200), StepTime())
    batch = [task(i, [1, 2, 3], 300, 0.0, band=2) for i in range(6)]
    urgent = task(99, [5, 6], 3, arrived=0.1, band=0)
    sim.submit([*batch, urgent])
    sim.run()
    step = StepTime().of(2, 600, 0)
    assert sim.records[99].first_token < 5 * step
    assert urgent.displaced == 0
    assert sum(each.displaced for each in batch) >= 1


def test_pages_are_taken_from_the_lower_band_first() -> None:
    sim = Simulator(model(slots=8, pages=32), StepTime())
    low = [task(i, [i] * 16, 40, 0.0, band=2) for i in range(4)]
    high = task(99, [9] * 60, 20, arrived=0.05, band=1)
    prompts = {each.id: list(each.tokens) for each in (*low, high)}
    sim.submit([*low, high])
    sim.run()
    check_all(sim, [*low, high], prompts)
    assert high.displaced == 0
    assert sim.records[99].ended < max(sim.records[each.id].ended for each in low)


def test_tenants_are_served_in_equal_measure_whatever_they_ask() -> None:
    sim = Simulator(model(slots=4, pages=400), StepTime())
    many = [task(i, [1] * 8, 32, 0.0, tenant="many") for i in range(400)]
    few = [task(1000 + i, [2] * 8, 32, 0.0, tenant="few") for i in range(40)]
    sim.submit([*many, *few])
    sim.run(until=sim.records[1000].task.arrived + 1.0)
    served = sim.core.counters.served
    # The bound of the VTC paper: twice the larger of one prompt's and one full batch's charge.
    assert abs(served["many"] - served["few"]) <= 2 * max(8, 4 * 2 * 40)


def test_a_batch_task_that_waited_long_enough_is_served_beside_interactive_ones() -> None:
    sim = Simulator(model(slots=1, pages=100), StepTime(base=0.1))
    flood = [task(i, [1], 10, arrived=i * 1.0, band=1, tenant=f"t{i}") for i in range(90)]
    patient = task(999, [1], 5, arrived=0.5, band=2, tenant="patient")
    sim.submit([*flood, patient])
    sim.run()
    assert sim.records[999].first_token < 60


@pytest.mark.parametrize("shared", [0, 60])
def test_a_shared_prefix_is_computed_once(shared: int) -> None:
    sim = Simulator(model(slots=4, pages=200), StepTime())
    prefix = list(range(shared))
    made = [task(i, [*prefix, 100 + i, *[i] * 11], 4, arrived=i * 1.0) for i in range(8)]
    sim.submit(made)
    sim.run()
    assert sum(each.first_cached for each in made) == 7 * shared

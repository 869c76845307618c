"""The scheduler's core under any traffic, in simulated time: right tokens, no page lost, nobody starves."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.sdk.messages import Step
from llmos.ipc.errors import Canceled, IOFailure, NoMemory
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.traffic import check_all, model, task

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


@settings(deadline=None, max_examples=60)
@given(tasks, st.integers(1, 6), st.integers(30, 80), st.integers(1, 9), st.integers(2, 9))
def test_a_driver_may_give_several_tokens_in_a_step(
    traffic: list[tuple[int, int, float, int, str]], slots: int, pages: int, steps: int, burst: int
) -> None:
    sim = Simulator(model(slots, pages), StepTime(), max_steps=steps, burst=burst)
    made = [task(i, [i] * p, n, t, band, tenant) for i, (p, n, t, band, tenant) in enumerate(traffic)]
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    sim.run()
    check_all(sim, made, prompts)


def test_who_gains_several_tokens_a_step_gets_pages_in_time() -> None:
    took = {}
    for burst in (1, 8):
        sim = Simulator(model(slots=1, pages=200), StepTime(), burst=burst)
        sim.submit([task(0, [1, 2, 3], 600)])
        sim.run()
        took[burst] = sim.now
    assert took[8] < took[1] / 3.5  # 4.5 tokens a step on average


def test_a_task_that_the_device_could_not_compute_ends_with_an_error() -> None:
    sim = Simulator(model(), StepTime())
    made = task(0, [1, 2, 3], 300)
    sim.submit([made])
    sim.run(until=0.1)
    flight = sim.host.flight[0]
    step = Step(flight.quantum.id, flight.received, [], [], [(made.slot, "error")], 5000)
    before = len(sim.records[0].times)
    sim.core.step(sim.host, step, sim.now)
    assert isinstance(sim.records[0].error, IOFailure)
    assert len(sim.records[0].times) == before


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

    def kill(victim: Task) -> None:
        sim.core.kill(victim, Canceled("killed"), sim.now)

    for index, time in kills:
        if index < len(made):
            victim = made[index]
            sim.at(max(time, victim.arrived + 1e-9), partial(kill, victim))
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
    sim.run(until=1.0)
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


def test_a_prompt_is_cached_also_if_its_task_ends_with_the_first_token() -> None:
    sim = Simulator(model(), StepTime())
    prompt = [i % 200 for i in range(40)]
    made = [task(0, [*prompt, 1], 1), task(1, [*prompt, 2], 1, 1.0)]
    sim.submit(made)
    sim.run()
    assert [each.first_cached for each in made] == [0, 40]


def test_sixteen_equal_prompts_at_once_compute_their_prefix_once() -> None:
    sim = Simulator(model(slots=16, pages=800, page_tokens=16, chunk_tokens=256), StepTime())
    prefix = [i % 251 for i in range(2000)]
    made = [task(i, [*prefix, i, 7, 7], 8) for i in range(16)]
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    sim.run()
    check_all(sim, made, prompts)
    computed = sum(each.prompt - each.first_cached for each in made)
    assert computed == 2003 + 15 * 3


def test_a_prefix_is_not_waited_for_when_another_tenant_or_a_lower_band_computes_it() -> None:
    sim = Simulator(model(slots=4, pages=800, page_tokens=16, chunk_tokens=256), StepTime())
    prefix = [i % 251 for i in range(2000)]
    made = [
        task(0, prefix, 8, band=2),
        task(1, prefix, 8, band=1),
        task(2, prefix, 8, band=1, tenant="b"),
    ]
    sim.submit(made)
    sim.run()
    assert [each.first_cached for each in made] == [0, 0, 0]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 300), st.floats(0, 0.2), st.integers(0, 2)), max_size=30
    ),
    st.lists(
        st.tuples(st.integers(0, 29), st.sampled_from(["kill", "stop", "nice"]), st.floats(0, 0.5)),
        max_size=15,
    ),
    st.integers(1, 2),
)
def test_shared_prefixes_and_verbs_on_any_hosts_end_right(
    traffic: list[tuple[int, int, float, int]], verbs: list[tuple[int, str, float]], hosts: int
) -> None:
    sim = Simulator(model(slots=3, pages=150), StepTime(), hosts=hosts)
    made = [
        task(i, [which] * (20 + length), 30, at, band) for i, (which, length, at, band) in enumerate(traffic)
    ]
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    killed = set[int]()
    for index, verb, at in verbs:
        if index < len(made):
            sim.at(made[index].arrived + at + 1e-9, partial(apply, sim, made[index], verb, killed))
    sim.run()
    check_all(sim, [each for each in made if each.id not in killed], prompts)


def apply(sim: Simulator, which: Task, verb: str, killed: set[int]) -> None:
    """Do what the verb says; a stopped task goes on 0.1 s later."""
    if which.place is Place.ENDED:
        return
    if verb == "kill":
        killed.add(which.id)
        sim.core.kill(which, Canceled("killed"), sim.now)
    elif verb == "nice":
        sim.core.nice(which, ("batch", "interactive")[which.band == "batch"], sim.now)
    else:
        sim.core.stop(which, sim.now)
        assert which.slot < 0
        sim.at(sim.now + 0.1, partial(go_on, sim, which))


def go_on(sim: Simulator, stopped: Task) -> None:
    if stopped.place is not Place.ENDED:
        sim.core.cont(stopped, sim.now)


def test_a_stopped_task_gives_way_and_continues_exactly() -> None:
    sim = Simulator(model(slots=1, pages=40), StepTime())
    first, second = task(1, [1] * 8, 100), task(2, [2] * 8, 100)
    prompts = {each.id: list(each.tokens) for each in (first, second)}
    sim.submit([first, second])
    sim.run(until=0.2)
    assert first.produced
    sim.core.stop(first, sim.now)
    produced = first.produced
    sim.run()
    assert (first.produced, first.place) == (produced, Place.STOPPED)
    assert sim.records[2].ended
    sim.core.cont(first, sim.now)
    sim.run()
    check_all(sim, [first, second], prompts)


def test_a_tenant_at_its_page_quota_waits_alone() -> None:
    sim = Simulator(model(slots=8, pages=64), StepTime())
    capped = [task(i, [i] * 20, 30, tenant="capped") for i in range(6)]
    for each in capped:
        each.max_pages = 20
    free = [task(100 + i, [i] * 20, 30, 0.01, tenant="free") for i in range(6)]
    prompts = {each.id: list(each.tokens) for each in (*capped, *free)}
    sim.submit([*capped, *free])
    sim.run()
    check_all(sim, [*capped, *free], prompts)
    assert max(sim.records[each.id].ended for each in free) < max(
        sim.records[each.id].ended for each in capped
    )


def test_a_task_that_its_quota_can_never_hold_is_refused() -> None:
    sim = Simulator(model(slots=2, pages=64), StepTime())
    big = task(1, [1] * 100, 10)
    big.max_pages = 10
    sim.submit([big, task(2, [2], 5)])
    sim.run()
    assert isinstance(sim.records[1].error, NoMemory)
    assert sim.records[2].reason == "length"


def test_a_long_prompt_holds_no_step_longer_than_the_band_allows() -> None:
    sim = Simulator(model(slots=8, pages=4000, page_tokens=16, chunk_tokens=2048), StepTime())
    sim.submit([task(9, [3] * 4000, 4, band=2, tenant="warm")])
    talk = task(0, [1] * 10, 300, arrived=1.0, band=0)
    sim.submit([talk, *(task(1 + i, [i] * 6000, 4, arrived=1.1, band=2, tenant=f"t{i}") for i in range(5))])
    sim.run()
    times = sim.records[0].times
    assert max(b - a for a, b in itertools.pairwise(times[30:])) < 0.030


def test_tasks_go_where_their_prefix_is_then_where_there_is_room() -> None:
    sim = Simulator(model(slots=4, pages=400, page_tokens=16, chunk_tokens=256), StepTime(), hosts=2)
    topics = [[k * 31 % 251] * 200 for k in (1, 2)]
    made = [task(i, [*topics[i % 2], i, 5], 8, arrived=0.2 * i) for i in range(12)]
    sim.submit(made)
    sim.run()
    for parity in (0, 1):
        assert len({each.arena for each in made[parity::2]}) == 1
    assert sum(each.first_cached > 0 for each in made) == 10
    burst = [task(100 + i, [200 + i] * 50, 200, arrived=10.0) for i in range(8)]
    sim.submit(burst)
    sim.run(until=10.5)
    assert [host.seated for host in sim.hosts] == [4, 4]

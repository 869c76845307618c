"""Swapping in simulated time: every sequence finds its own KV, whatever is moved, killed or fails."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llmos.drivers.sdk.messages import Moved
from llmos.ipc.errors import Canceled
from llmos.services.memory.invariants import check
from llmos.services.memory.messages import Batch
from llmos.services.scheduler.simulated_cache import LinkTime
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place, Swap, Task
from tests.services.scheduler.traffic import check_all, model, task

# Prefill is dear and links are fast: whatever can be swapped is.
DEAR = StepTime(prefill=1e-2)
FAST = LinkTime(host=1e6, disk=1e5)
SLOW = LinkTime(host=1.0, disk=1.0)
BATCH, MOVED = Batch("device", "host", [(0, 0)], "a"), Moved(1, 1_000_000)  # a byte in a second

traffic = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt
        st.integers(1, 60),  # output
        st.floats(0, 3.0),  # arrival
        st.integers(0, 2),  # band
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([0, 0, 0, 30]),  # page quota
    ),
    min_size=1,
    max_size=40,
)
Request = tuple[int, int, float, int, str, int]


def tasks_of(requests: list[Request]) -> list[Task]:
    made = []
    for i, (prompt, count, at, band, tenant, quota) in enumerate(requests):
        tokens = [((i % 5) * 7 + j // 9) % 256 for j in range(prompt)]
        each = task(i, tokens, count, at, band, tenant)
        each.max_pages = quota
        made.append(each)
    return made


def run(sim: Simulator, made: list[Task]) -> None:
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    sim.run()
    check_all(sim, made, prompts)
    check(sim.memory)
    assert all(not host.tiers.away and not host.tiers.journeys for host in sim.hosts)


@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(traffic, st.integers(1, 6), st.integers(30, 60), st.integers(0, 60), st.integers(0, 40))
def test_any_traffic_ends_with_the_right_tokens_and_all_pages_back(
    requests: list[Request], slots: int, pages: int, host: int, disk: int
) -> None:
    sim = Simulator(model(slots, pages, host_pages=host, disk_pages=disk), DEAR, link_time=FAST, checked=True)
    run(sim, tasks_of(requests))


@pytest.mark.parametrize("seed", range(12))
def test_tasks_are_killed_and_stopped_and_moves_fail(seed: int) -> None:
    rng = random.Random(seed)
    sim = Simulator(
        model(3, rng.randint(30, 60), host_pages=rng.choice((5, 60)), disk_pages=rng.choice((0, 30))),
        DEAR,
        link_time=FAST,
        checked=True,
    )
    made = tasks_of(
        [
            (
                rng.randint(1, 60),
                rng.randint(1, 60),
                rng.uniform(0, 3),
                rng.randint(0, 2),
                rng.choice("ab"),
                0,
            )
            for _ in range(40)
        ]
    )
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    killed = set()

    def kill(one: Task) -> None:
        sim.core.kill(one, Canceled("killed"), sim.now)

    def stop(one: Task) -> None:
        if one.place is not Place.ENDED:
            sim.core.stop(one, sim.now)

    def cont(one: Task) -> None:
        sim.core.cont(one, sim.now)

    for each in rng.sample(made, 10):
        killed.add(each)
        sim.at(each.arrived + rng.uniform(0, 2), partial(kill, each))
    for each in rng.sample(made, 15):
        at = each.arrived + rng.uniform(0, 2)
        sim.at(at, partial(stop, each))
        sim.at(at + rng.uniform(0, 2), partial(cont, each))
    for _ in range(8):
        sim.at(rng.uniform(0, 5), sim.fail_move)
    sim.run()
    check_all(sim, [each for each in made if each not in killed], prompts)
    check(sim.memory)


@pytest.mark.parametrize("seed", range(8))
def test_a_host_may_be_lost_and_memory_started_anew_at_any_time(seed: int) -> None:
    rng = random.Random(seed)
    sim = Simulator(
        model(3, rng.randint(30, 60), host_pages=60, disk_pages=10), DEAR, link_time=FAST, checked=True
    )
    made = tasks_of(
        [
            (rng.randint(1, 60), rng.randint(1, 60), rng.uniform(0, 3), rng.randint(0, 2), "a", 0)
            for _ in range(40)
        ]
    )
    for _ in range(6):
        sim.at(rng.uniform(0, 5), sim.restart_memory)
    for _ in range(2):
        sim.at(rng.uniform(0, 5), sim.restart_driver)
    run(sim, made)


def crowd(
    host_pages: int, link_time: LinkTime = FAST, step_time: StepTime = DEAR
) -> tuple[Simulator, list[Task]]:
    """Three batch tasks fill the device; an interactive one needs half of it."""
    sim = Simulator(model(4, 64, host_pages=host_pages), step_time, link_time=link_time, checked=True)
    low = [task(i, [i] * 60, 60, 0.0, band=2) for i in range(3)]
    return sim, [*low, task(99, [9] * 120, 20, arrived=1.9, band=1)]


def test_a_displaced_task_is_not_computed_again() -> None:
    sim, made = crowd(host_pages=64)
    run(sim, made)
    assert sim.core.swapping.swapped > 0
    in_flight = 8  # tokens of the steps that were on the device when it was displaced
    assert sim.prefilled <= sum(each.prompt for each in made) + in_flight


def test_without_a_host_tier_it_is_computed_again() -> None:
    sim, made = crowd(host_pages=0)
    run(sim, made)
    assert sim.core.swapping.swapped == 0
    assert sim.prefilled > sum(each.prompt for each in made)


def test_what_is_sooner_computed_is_not_swapped() -> None:
    sim, made = crowd(host_pages=64, link_time=replace(SLOW, host=100.0), step_time=StepTime())
    sim.host.tiers.links.observe(BATCH, MOVED)
    run(sim, made)
    assert sim.core.swapping.swapped == 0


def test_an_interactive_task_does_not_wait_long_for_pages_to_leave() -> None:
    sim, made = crowd(host_pages=64, link_time=SLOW)
    sim.host.tiers.links.observe(BATCH, MOVED)
    run(sim, made)
    assert sim.core.swapping.swapped == 0


def test_a_full_tier_is_no_obstacle() -> None:
    sim, made = crowd(host_pages=2)
    run(sim, made)


def test_pages_of_a_prefix_are_fetched_instead_of_computed() -> None:
    """A conversation goes on after others took its place on the device."""
    sim = Simulator(model(1, 100, host_pages=200), DEAR, link_time=FAST, checked=True)
    first = [[i] * 80 for i in range(8)]
    made = [task(i, prompt, 4, float(i) * 3) for i, prompt in enumerate(first)]
    again = [task(10 + i, prompt + [7] * 8, 4, 30.0 + i * 3) for i, prompt in enumerate(first)]
    run(sim, [*made, *again])
    assert all(each.first_cached >= 76 for each in again), [each.first_cached for each in again]


def test_a_task_is_fetched_ahead_of_its_turn() -> None:
    sim = Simulator(model(1, 80, host_pages=80), DEAR, link_time=FAST, checked=True)
    low = task(0, [1] * 120, 30, 0.0, band=2)
    high = task(1, [2] * 200, 4, 1.25, band=1)
    last = task(2, [3] * 4, 60, 1.3, band=1)
    seen = []

    def look() -> None:
        if low.place is Place.WAITING and last.place is Place.RUNNING:
            seen.append(low.swap)
        if last.place is not Place.ENDED:
            sim.at(sim.now + 0.01, look)

    sim.at(1.7, look)
    run(sim, [low, high, last])
    assert sim.core.swapping.swapped == 1
    assert seen[-1] is Swap.NONE, "it is back before its slot is free"

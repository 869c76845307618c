"""The step-time model finds what steps cost from what they took."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.services.scheduler.simulator import StepTime
from llmos.services.scheduler.steptime import CELLS, StepTimes

TRUE = StepTime()
BENT = StepTime(kink=220)
ROWS, EACH, PREFILLED = (1, 7, 40, 150), (60, 600), (0, 50, 130, 300, 512, 1024)


def fitted(noise: float = 0.0, steps: int = 3000, true: StepTime = TRUE) -> StepTimes:
    rng, times = random.Random(3), StepTimes()
    for _ in range(steps):
        rows, each = rng.randint(0, 256), rng.randint(10, 1000)
        prefilled = rng.choice([0, 0, 0, rng.randint(1, 2048)])
        seconds = true.of(rows, rows * each, prefilled) * (1 + rng.uniform(-noise, noise))
        times.observe(rows, rows * each, prefilled, seconds)
    return times


@pytest.mark.parametrize(
    ("true", "noise", "error"), [(TRUE, 0.0, 1e-6), (TRUE, 0.1, 0.02), (BENT, 0.1, 0.03)]
)
def test_estimates_come_close_to_the_truth(true: StepTime, noise: float, error: float) -> None:
    times = fitted(noise, true=true)
    for rows, context, prefilled in ((1, 500, 0), (64, 30_000, 0), (256, 128_000, 0), (128, 60_000, 1024)):
        found = times.seconds(rows, context, prefilled) / times.drift
        assert found == pytest.approx(true.of(rows, context, prefilled), rel=error)
    assert times.drift == pytest.approx(1.0, abs=0.02)


# Sizes of steps that no kind of those below is near.
BETWEEN = st.one_of(st.integers(96, 127), st.integers(224, 255), st.integers(384, 447))


@st.composite
def step_times(draw: st.DrawFn, kinks: st.SearchStrategy[int]) -> StepTime:
    """Devices whose steps take from a tenth of a millisecond to some seconds."""
    base = draw(st.floats(1e-4, 0.1))
    row, context, prefill = (base * draw(st.floats(0.0, most)) for most in (0.02, 1e-4, 9e-3))
    return StepTime(base, row, context, prefill + 1e-3 * base, draw(kinks))


def measured(true: StepTime, seed: int) -> StepTimes:
    """Each of some kinds of steps a few times, in any order."""
    times, kinds = StepTimes(), [*itertools.product(ROWS, EACH, PREFILLED)] * 5
    random.Random(seed).shuffle(kinds)
    for rows, each, prefilled in kinds:
        times.observe(rows, rows * each, prefilled, true.of(rows, rows * each, prefilled))
    return times


def worst(true: StepTime, seed: int) -> float:
    """The largest relative error of estimates, of steps unlike those that were measured."""
    times = measured(true, seed)
    found = 0.0
    for step in ((3, 500, 0), (64, 30_000, 0), (150, 90_000, 80), (90, 9_000, 128), (128, 60_000, 2048)):
        found = max(found, abs(times.seconds(*step) / times.drift / true.of(*step) - 1.0))
    return found


@settings(max_examples=40, deadline=None)
@given(true=step_times(st.one_of(st.just(0), BETWEEN)), seed=st.integers(0, 99))
def test_of_exact_measurements_the_fit_is_exact(true: StepTime, seed: int) -> None:
    assert worst(true, seed) < 1e-6


@settings(max_examples=40, deadline=None)
@given(true=step_times(st.integers(60, 600)), seed=st.integers(0, 99))
def test_a_knot_among_the_sizes_measured_is_found_as_well(true: StepTime, seed: int) -> None:
    assert worst(true, seed) < 0.03


STEPS = st.tuples(st.integers(0, 512), st.integers(0, 300_000), st.integers(0, 4096), st.floats(1e-4, 1.0))


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=80), more=st.tuples(*[st.integers(0, 3000)] * 3))
def test_whatever_is_measured_no_step_is_shorter_with_more_work(
    steps: list[tuple[int, int, int, float]], more: tuple[int, int, int]
) -> None:
    times = StepTimes()
    for step in steps:
        times.observe(*step)
    for rows, context, prefilled, _ in [(0, 0, 0, 0.0), *steps]:
        least = times.seconds(rows, context, prefilled)
        assert least >= 0.0
        assert times.seconds(rows + more[0], context, prefilled) >= least
        assert times.seconds(rows, context + more[1], prefilled) >= least
        assert times.seconds(rows, context, prefilled + more[2]) >= least


def test_before_the_first_step_nothing_is_known() -> None:
    assert not StepTimes()
    assert StepTimes().seconds(10, 1000, 100) == 0.0


def test_a_long_quiet_decode_does_not_make_it_forget_prefill() -> None:
    times = fitted()
    for i in range(20_000):
        times.observe(8, 4000 + i % 100, 0, TRUE.of(8, 4000 + i % 100, 0))
    assert times.seconds(8, 4000, 2048) == pytest.approx(TRUE.of(8, 4000, 2048), rel=0.01)


def test_a_compilation_in_the_first_step_of_its_kind_is_soon_no_part_of_it() -> None:
    times = StepTimes()
    times.observe(4, 100, 0, 5.0)
    for _ in range(3):
        times.observe(4, 100, 0, 0.005)
    times.observe(4, 100, 0, 0.3)
    assert times.seconds(4, 100, 0) / times.drift < 0.008


def test_it_follows_a_device_that_became_slower() -> None:
    times = fitted()
    for _ in range(300):
        for rows in (1, 10, 100):
            times.observe(rows, rows * 100, 0, 3 * TRUE.of(rows, rows * 100, 0))
    assert times.seconds(10, 1000, 0) > 2 * TRUE.of(10, 1000, 0)


def test_memory_is_bounded() -> None:
    times = StepTimes()
    for i, j, k in itertools.product(range(12), range(12), range(12)):
        times.observe(1 << i, 1 << j, 1 << k, 0.01)
    assert len(times._cells) == CELLS


@pytest.mark.parametrize("true", [TRUE, BENT])
@pytest.mark.parametrize("rows", [32, 250])
def test_the_room_for_prefill_is_what_the_budget_leaves(true: StepTime, rows: int) -> None:
    times = measured(true, 1)
    room = times.prefill_room(rows, 16_000, 0.025)
    assert times.seconds(rows, 16_000, room) == pytest.approx(0.025)
    assert times.prefill_room(rows, 16_000, 0.001) <= 0.0


def test_a_run_of_steps_is_compared_with_its_forecast_while_the_device_has_work() -> None:
    times, now = fitted(), 100.0
    for _ in range(64):
        now += 1.1 * TRUE.of(10, 1000, 0)
        times.observe(10, 1000, 0, TRUE.of(10, 1000, 0), now)
    assert times.slippage.share(16) == pytest.approx(0.1, abs=0.02)
    times.rest()
    times.observe(10, 1000, 0, TRUE.of(10, 1000, 0), now + 60.0)
    assert times.slippage.share(1) == pytest.approx(0.1, abs=0.02)

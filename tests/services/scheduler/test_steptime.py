"""The step-time model finds what steps cost from what they took."""

from __future__ import annotations

import random

import pytest

from llmos.services.scheduler.simulator import StepTime
from llmos.services.scheduler.steptime import CELLS, StepTimes

TRUE = StepTime()


def fitted(noise: float = 0.0, steps: int = 3000) -> StepTimes:
    rng, times = random.Random(3), StepTimes()
    for _ in range(steps):
        rows, each = rng.randint(0, 256), rng.randint(10, 1000)
        prefilled = rng.choice([0, 0, 0, rng.randint(1, 2048)])
        seconds = TRUE.of(rows, rows * each, prefilled) * (1 + rng.uniform(-noise, noise))
        times.observe(rows, rows * each, prefilled, seconds)
    return times


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.08), (0.1, 0.12)])
def test_estimates_come_close_to_the_truth(noise: float, error: float) -> None:
    times = fitted(noise)
    for rows, context, prefilled in ((1, 500, 0), (64, 30_000, 0), (256, 128_000, 0), (128, 60_000, 1024)):
        assert times.seconds(rows, context, prefilled) == pytest.approx(
            TRUE.of(rows, context, prefilled), rel=error
        )


def test_before_the_first_step_nothing_is_known() -> None:
    assert not StepTimes()
    assert StepTimes().seconds(10, 1000, 100) == 0.0


def test_a_long_quiet_decode_does_not_make_it_forget_prefill() -> None:
    times = fitted()
    for i in range(20_000):
        times.observe(8, 4000 + i % 100, 0, TRUE.of(8, 4000 + i % 100, 0))
    assert times.seconds(8, 4000, 2048) == pytest.approx(TRUE.of(8, 4000, 2048), rel=0.1)


def test_a_compilation_in_the_first_step_of_its_kind_is_soon_no_part_of_it() -> None:
    times = StepTimes()
    times.observe(4, 100, 0, 5.0)
    for _ in range(3):
        times.observe(4, 100, 0, 0.005)
    times.observe(4, 100, 0, 0.3)
    assert times.seconds(4, 100, 0) < 0.008


def test_it_follows_a_device_that_became_slower() -> None:
    times = fitted()
    for _ in range(300):
        for rows in (1, 10, 100):
            times.observe(rows, rows * 100, 0, 3 * TRUE.of(rows, rows * 100, 0))
    assert times.seconds(10, 1000, 0) > 2 * TRUE.of(10, 1000, 0)


def test_a_cautious_estimate_is_higher_where_steps_vary() -> None:
    times = fitted(0.2)
    assert times.seconds(10, 1000, 0, cautious=True) > 1.1 * times.seconds(10, 1000, 0)


def test_memory_is_bounded() -> None:
    times = StepTimes()
    for i in range(20):
        for j in range(20):
            for k in range(20):
                times.observe(1 << i, 1 << j, 1 << k, 0.01)
    assert len(times._cells) == CELLS


def test_the_room_for_prefill_is_what_the_budget_leaves() -> None:
    times = fitted()
    room = times.prefill_room(32, 16_000, 0.025)
    assert times.seconds(32, 16_000, room) == pytest.approx(0.025)

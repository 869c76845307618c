"""How much longer than forecast: a share for each number of steps."""

from __future__ import annotations

import random

import pytest

from llmos.services.scheduler.slippage import FIRST, MOST, Slippage

STEP = 0.010


def after(*slips: float) -> Slippage:
    """Steps of 10 ms that took so much longer."""
    found = Slippage()
    for slip in slips:
        found.took(STEP, STEP * (1.0 + slip))
    return found


def worse(slippage: Slippage, runs: list[float], steps: int) -> float:
    """The part of runs of so many steps that slipped by more than is known."""
    totals = [sum(runs[i : i + steps]) / steps for i in range(0, len(runs), steps)]
    return sum(total > slippage.share(steps) for total in totals) / len(totals)


def test_before_the_first_step_a_little_is_assumed() -> None:
    assert Slippage().share(1) == Slippage().share(1000) == FIRST


def test_noise_cancels_out_in_long_runs() -> None:
    rng = random.Random(1)
    runs = [rng.uniform(-0.2, 0.2) for _ in range(20_000)]
    found = after(*runs)
    assert found.share(1) > 0.12
    assert found.share(64) < 0.05
    for steps in (1, 8, 64):
        assert worse(found, runs, steps) < 0.15


def test_a_wrong_forecast_does_not() -> None:
    found = after(*[0.1] * 1000)
    assert [found.share(steps) for steps in (1, 8, 500)] == pytest.approx([0.1] * 3, abs=0.01)


def test_what_comes_late_and_is_made_up_for_counts_for_few_steps_only() -> None:
    found = after(*[0.5, -0.5] * 500)
    assert found.share(1) > 0.4
    assert found.share(2) == pytest.approx(0.0, abs=0.01)


def test_longer_runs_than_any_so_far_are_taken_to_be_as_wrong() -> None:
    assert after(*[0.3] * 8).share(512) == after(*[0.3] * 8).share(8) > 0.1


def test_one_stall_is_no_run_without_end_and_is_forgotten() -> None:
    found = after(1000.0)
    assert found.share(1) < MOST
    for _ in range(1000):
        found.took(STEP, STEP)
    assert found.share(1) < 0.01


def test_runs_do_not_go_on_over_an_interruption() -> None:
    found = after(0.5)
    before = found.share(2)
    found.interrupt()
    found.took(STEP, 2 * STEP)
    assert len(found.stretches()) == 32
    assert found._shares[1:] == []
    assert found.share(2) > before


def test_nobody_is_promised_more_because_steps_were_short() -> None:
    assert after(*[-0.5] * 1000).share(1) == 0.0

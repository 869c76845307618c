"""Restart policy: at once first, then later and later, at last not at all."""

from __future__ import annotations

from llmos.services.supervisor.restart import FIRST_DELAY, LONGEST_DELAY, Policy, delay

OFTEN = Policy(restarts=100, window=1e6)


def test_the_first_crash_restarts_at_once() -> None:
    assert delay([10.0], OFTEN) == 0.0


def test_each_further_crash_doubles_the_wait() -> None:
    waits = [delay([float(i) for i in range(n)], OFTEN) for n in (2, 3, 4, 5)]
    assert waits == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, 8 * FIRST_DELAY]


def test_the_wait_has_a_bound() -> None:
    assert delay([float(i) for i in range(90)], OFTEN) == LONGEST_DELAY


def test_more_crashes_than_allowed_within_the_window_give_up() -> None:
    policy = Policy(restarts=3, window=60.0)
    assert delay([1.0, 2.0, 3.0], policy) is not None
    assert delay([1.0, 2.0, 3.0, 4.0], policy) is None


def test_crashes_before_the_window_are_forgiven() -> None:
    policy = Policy(restarts=1, window=60.0)
    assert delay([0.0, 100.0], policy) == 0.0
    assert delay([0.0, 50.0, 100.0], policy) is None


def test_no_restart_is_allowed_where_the_manifest_says_so() -> None:
    assert delay([5.0], Policy(restarts=0, window=60.0)) is None

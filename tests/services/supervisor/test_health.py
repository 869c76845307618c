"""Health is progress: late beats make a suspect, and only a lasting suspicion counts."""

from __future__ import annotations

from llmos.kernel.messages import Name
from llmos.services.supervisor.health import CONFIRM, REGISTER_LIMIT, observe


def line(beat_age: float, limit: float = 15.0) -> Name:
    return Name("memory", 7, 4711, True, 0, beat_age, 1, limit)


def test_a_process_that_beats_is_healthy() -> None:
    seen = observe(line(0.4), None, 0.0)
    assert seen.suspect is None
    assert not seen.stuck(1e6)


def test_a_late_beat_is_suspect_first_and_stuck_if_it_stays_away() -> None:
    seen = observe(line(15.1), None, 100.0)
    assert not seen.stuck(100.0)
    seen = observe(line(15.1 + CONFIRM), seen, 100.0 + CONFIRM)
    assert seen.stuck(100.0 + CONFIRM)
    assert "no heartbeat for 17 s" in seen.reason


def test_a_long_piece_of_work_that_was_announced_is_healthy() -> None:
    assert observe(line(300.0, limit=600.0), None, 0.0).suspect is None


def test_a_beat_after_the_machine_slept_clears_the_suspicion() -> None:
    asleep = observe(line(9000.0), None, 100.0)
    awake = observe(line(0.2), asleep, 100.5)
    assert awake.suspect is None
    assert not awake.stuck(200.0)


def test_a_process_the_kernel_does_not_know_gets_time_to_register_again() -> None:
    seen = observe(line(0.1), None, 0.0)
    seen = observe(None, seen, REGISTER_LIMIT - 1)
    assert seen.suspect is None
    seen = observe(None, seen, REGISTER_LIMIT + 1)
    seen = observe(None, seen, REGISTER_LIMIT + 1 + CONFIRM)
    assert seen.stuck(REGISTER_LIMIT + 1 + CONFIRM)

"""Leaving: asked, told, ended."""

from __future__ import annotations

from llmos.services.supervisor.stopping import ASK_SECONDS, TERMINATE_SECONDS, action


def test_a_process_is_asked_then_told_then_killed() -> None:
    times = (0.0, ASK_SECONDS, ASK_SECONDS + TERMINATE_SECONDS)
    assert [action(t, can_ask=True, hurry=False) for t in times] == ["ask", "terminate", "kill"]


def test_one_that_cannot_be_asked_is_told_at_once() -> None:
    assert action(0.0, can_ask=False, hurry=False) == "terminate"
    assert action(TERMINATE_SECONDS, can_ask=False, hurry=False) == "kill"


def test_an_operator_in_a_hurry_does_not_wait() -> None:
    assert action(0.0, can_ask=True, hurry=True) == "kill"

"""Tokens per minute, by token bucket."""

from __future__ import annotations

import pytest

from llmos.services.scheduler import limits
from llmos.services.scheduler.limits import RateLimits


def test_a_tenant_may_use_a_minutes_tokens_at_once_and_then_waits() -> None:
    rates = RateLimits()
    assert rates.wait("a", 600, 600, 0.0) == 0.0
    rates.take("a", 600, 600, 0.0)
    assert rates.wait("a", 600, 100, 0.0) == pytest.approx(10.0)
    assert rates.wait("a", 600, 100, 10.0) == 0.0
    assert rates.wait("b", 600, 600, 0.0) == 0.0, "another tenant's are its own"


def test_more_than_a_minutes_tokens_are_never_let_in() -> None:
    assert RateLimits().wait("a", 600, 601, 0.0) == float("inf")


def test_without_a_limit_nothing_is_counted() -> None:
    rates = RateLimits()
    rates.take("a", 0, 10**9, 0.0)
    assert rates.wait("a", 0, 10**9, 0.0) == 0.0


def test_what_a_task_left_can_be_used_again_and_never_more() -> None:
    rates = RateLimits()
    rates.take("a", 600, 500, 0.0)
    rates.give_back("a", 400)
    assert rates.wait("a", 600, 500, 0.0) == 0.0
    rates.give_back("a", 10**6)
    assert rates.wait("a", 600, 600, 0.0) == 0.0
    rates.take("a", 600, 600, 0.0)
    assert rates.wait("a", 600, 600, 0.0) == pytest.approx(60.0)


def test_only_full_buckets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TENANTS", 2)
    rates = RateLimits()
    rates.take("a", 60, 60, 0.0)
    rates.take("b", 60, 0, 0.0)
    rates.take("c", 60, 10, 0.0)
    assert rates.wait("a", 60, 60, 0.0) == pytest.approx(60.0)

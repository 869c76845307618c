"""Health is progress: each fault is named, and a system that works is well however slow it is."""

from __future__ import annotations

import msgspec
import pytest

from llmos.kernel.messages import Name
from llmos.services.models.messages import ModelLine
from llmos.services.monitor.health import STALL_SECONDS, Progress, advance, judge
from llmos.services.scheduler.messages import HostLine, SchedulerStats

SCHEDULER = Name("scheduler", 5, 77, True, 0, 0.4, 10, 15.0)
IDLE = SchedulerStats(waiting=0, running=0, finished=3, displaced=0, tokens=100, served={}, hosts=[])
BUSY = msgspec.structs.replace(IDLE, running=2, waiting=1)
READY = ModelLine(name="m", state="ready", driver="d")


def name(**changes: object) -> Name:
    return msgspec.structs.replace(SCHEDULER, **changes)


def model(state: str, **changes: object) -> ModelLine:
    return msgspec.structs.replace(READY, state=state, **changes)


def test_a_system_that_is_up_and_idle_is_well() -> None:
    health = judge([SCHEDULER], IDLE, [READY], advance(None, IDLE, 0.0), 9999.0)
    assert health.ok
    assert health.reasons == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (name(connection=0, ready=False), "scheduler is not running"),
        (name(ready=False), "scheduler is not ready"),
        (name(beat_age=16.0), "scheduler is stuck: no sign of life for 16 s"),
    ],
)
def test_a_service_that_does_not_work_is_named(line: Name, reason: str) -> None:
    health = judge([line], IDLE, [READY], None, 0.0)
    assert not health.ok
    assert health.reasons == [reason]


def test_a_service_that_announced_long_work_is_well() -> None:
    assert judge([name(beat_age=60.0, limit=300.0)], IDLE, [READY], None, 0.0).ok


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([], "no model is configured"),
        ([model("loading", progress=0.42, phase="compile")], "loading m: 42% (compile)"),
        ([model("failed", error="EIO: disk")], "m failed: EIO: disk"),
        ([model("missing")], "m is missing: llmos pull m"),
        ([model("unloaded")], "m is not loaded: llmos load m"),
    ],
)
def test_without_a_model_nobody_is_served(models: list[ModelLine], reason: str) -> None:
    assert judge([SCHEDULER], IDLE, models, None, 0.0).reasons == [reason]


def test_one_ready_model_is_enough() -> None:
    assert judge([SCHEDULER], IDLE, [model("failed"), READY], None, 0.0).ok


def test_those_who_do_not_answer_are_named() -> None:
    reasons = judge(None, None, None, None, 0.0).reasons
    assert reasons == ["kernel does not answer", "scheduler does not answer", "models does not answer"]


def test_tasks_without_tokens_are_a_fault_after_a_while() -> None:
    progress = advance(None, BUSY, 100.0)
    progress = advance(progress, BUSY, 100.0 + STALL_SECONDS)
    assert judge([SCHEDULER], BUSY, [READY], progress, 100.0 + STALL_SECONDS).ok
    late = judge([SCHEDULER], BUSY, [READY], progress, 101.0 + STALL_SECONDS)
    assert late.reasons == ["2 tasks run and 1 wait, but no token for 31 s"]


@pytest.mark.parametrize(
    "moved",
    [
        {"tokens": 101},
        {"finished": 4},
        {"hosts": [HostLine(driver="d", model="m", running=1, slots=1, steps=1, tokens=0, step_micros=1.0)]},
        {"running": 0, "waiting": 0},
    ],
    ids=["token", "end", "step", "idle"],
)
def test_anything_done_is_progress(moved: dict[str, object]) -> None:
    before = advance(None, BUSY, 0.0)
    after = advance(before, msgspec.structs.replace(BUSY, **moved), 50.0)
    assert after is not None
    assert after.since == 50.0


def test_waiting_tasks_that_never_start_are_a_fault() -> None:
    waiting = msgspec.structs.replace(IDLE, waiting=1)
    assert not judge([SCHEDULER], waiting, [READY], Progress((100, 3, 0), 0.0), 40.0).ok


def test_a_scheduler_started_anew_is_progress() -> None:
    before = advance(None, BUSY, 0.0)
    assert advance(before, None, 10.0) == before
    again = advance(before, msgspec.structs.replace(BUSY, tokens=0, finished=0), 50.0)
    assert again == Progress((0, 0, 0), 50.0)

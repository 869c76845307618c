"""From counters to health. Pure: the time is an argument, in seconds of any steady clock.

Healthy means that work gets done: a process that exists but does not move, and a queue that does not shrink,
are faults; a long prefill is none, since its steps count as progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmos.kernel.messages import Name
from llmos.services.models.messages import ANSWERING, ModelLine
from llmos.services.monitor.messages import Health
from llmos.services.scheduler.messages import SchedulerStats

STALL_SECONDS = 30.0


class Progress(NamedTuple):
    """What the scheduler had done when it was last seen to move, and when that was."""

    work: tuple[int, int, int]
    since: float


def advance(before: Progress | None, stats: SchedulerStats | None, now: float) -> Progress | None:
    """Progress after one more look at the scheduler; an idle one is always up to date."""
    if stats is None:
        return before
    work = stats.tokens, stats.finished, sum(host.steps for host in stats.hosts)
    if before is None or not _is_busy(stats) or work != before.work:
        return Progress(work, now)
    return before


def _is_busy(stats: SchedulerStats) -> bool:
    return stats.running > 0 or stats.waiting > 0


def judge(
    names: Sequence[Name] | None,
    stats: SchedulerStats | None,
    models: Sequence[ModelLine] | None,
    progress: Progress | None,
    now: float,
) -> Health:
    """Whether the system does what it is for, and every reason why not; None stands for no answer."""
    reasons = _services(names)
    if stats is None:
        reasons.append("scheduler does not answer")
    elif progress is not None and _is_busy(stats) and now - progress.since > STALL_SECONDS:
        seconds = now - progress.since
        reasons.append(
            f"{stats.running} tasks run and {stats.waiting} wait, but no token for {seconds:.0f} s"
        )
    reasons += _models(models)
    return Health(ok=not reasons, reasons=reasons)


def _services(names: Sequence[Name] | None) -> list[str]:
    if names is None:
        return ["kernel does not answer"]
    return [reason for name in names if (reason := _service(name))]


def _service(line: Name) -> str:
    if line.connection == 0:
        return f"{line.name} is not running"
    if not line.ready:
        return f"{line.name} is not ready"
    if line.beat_age > line.limit:
        return f"{line.name} is stuck: no sign of life for {line.beat_age:.0f} s"
    return ""


def _models(models: Sequence[ModelLine] | None) -> list[str]:
    """Nothing, if any model takes requests; otherwise what each is doing instead."""
    if models is None:
        return ["models does not answer"]
    if any(model.state in ANSWERING for model in models):
        return []
    return [_model(model) for model in models] or ["no model is configured"]


def _model(model: ModelLine) -> str:
    if model.state == "loading":
        phase = f" ({model.phase})" if model.phase else ""
        return f"loading {model.name}: {model.progress:.0%}{phase}"
    if model.state == "failed":
        return f"{model.name} failed: {model.error}"
    if model.state == "missing":
        return f"{model.name} is missing: llmos pull {model.name}"
    return f"{model.name} is not loaded: llmos load {model.name}"

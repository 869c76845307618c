"""The messages on the link to monitor."""

from __future__ import annotations

import msgspec

from llmos.kernel.messages import Name, Stats
from llmos.services.memory.messages import ArenaUsage
from llmos.services.models.messages import ModelLine
from llmos.services.scheduler.messages import SchedulerStats


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the system makes progress, and if not, why; ``ok`` is what a load balancer wants to know."""

    ok: bool
    reasons: list[str]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was counted, ``age`` seconds ago; None where a service did not answer."""

    age: float
    health: Health
    kernel: Stats | None
    services: list[Name]
    scheduler: SchedulerStats | None
    arenas: list[ArenaUsage]
    models: list[ModelLine]

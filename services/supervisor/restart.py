"""When a process that ended is started again, and when it is given up.

The restart intensity of Erlang/OTP supervisors (at most so many restarts within a period), with exponential
backoff between restarts: the first crash is answered at once, since most are transient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_DELAY = 0.25
LONGEST_DELAY = 15.0


@dataclass(frozen=True)
class Policy:
    """At most ``restarts`` within ``window`` seconds."""

    restarts: int
    window: float


def delay(exits: Sequence[float], policy: Policy) -> float | None:
    """Seconds to wait before the next start, or None to give up.

    ``exits`` are the times in seconds at which the process ended, the latest last.
    """
    recent = count_recent(exits, policy)
    if recent > policy.restarts:
        return None
    if recent <= 1:
        return 0.0
    exponent = min(recent - 2, 32)
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0**exponent)


def count_recent(exits: Sequence[float], policy: Policy) -> int:
    """How many of the exits lie within the window that ends with the latest."""
    return sum(1 for time in exits if time > exits[-1] - policy.window) if exits else 0

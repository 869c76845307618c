"""Whether a process makes progress: a long prefill is healthy, a loop that no longer turns is not.

A process beats while its loop turns, and says beforehand how long it may be until its next beat. One that
is late is suspect; a suspect gets a moment to show that it was the machine that stood still (a suspended
laptop, a stopped container) before it is found stuck.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos.kernel.messages import Name

REGISTER_LIMIT = 30.0
CONFIRM = 2.0


@dataclass(frozen=True)
class Seen:
    """What was observed of a process that was ready; times in seconds of a monotonic clock.

    ``known`` is when the kernel last knew it; it has been suspect since ``suspect``, for ``reason``.
    """

    known: float
    suspect: float | None = None
    reason: str = ""

    def stuck(self, now: float) -> bool:
        """Whether the suspicion has lasted long enough to act on it."""
        return self.suspect is not None and now - self.suspect >= CONFIRM


def observe(line: Name | None, seen: Seen | None, now: float) -> Seen:
    """Take in the line of a process that was ready; None where the kernel does not know it as such."""
    known = now if line is not None or seen is None else seen.known
    reason = _suspicion(line, now - known)
    if not reason:
        return Seen(known)
    return Seen(known, now if seen is None or seen.suspect is None else seen.suspect, reason)


def _suspicion(line: Name | None, unknown: float) -> str:
    """Why a process is suspect, or nothing; it has not been registered for ``unknown`` seconds."""
    if unknown > REGISTER_LIMIT:
        return f"not registered for {unknown:.0f} s"
    if line is not None and line.beat_age > line.limit:
        return f"no heartbeat for {line.beat_age:.0f} s, allowed are {line.limit:g}"
    return ""

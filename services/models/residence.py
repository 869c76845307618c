"""Which models may leave their device, and when. No I/O, no clock.

``park`` of a model in the manifest: "never" leaves only by hand, "pressure" also where another model lacks
memory, and a time such as "10m" after so long without a task, or earlier where another lacks memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Residence = Literal["awake", "parking", "parked", "waking"]


@dataclass(frozen=True)
class Standing:
    """One model on a device, or being loaded: whether it ``may`` leave, and seconds since it had a task, 0.0
    while it has one or is not settled yet. ``starved``: it waits itself for memory."""

    name: str
    may: bool
    residence: Residence
    idle: float
    starved: bool = False


def victim(standings: Sequence[Standing]) -> str | None:
    """The model that leaves for another: of those that may and have no task, the one idle for longest."""
    found = [one for one in standings if one.may and one.residence == "awake" and one.idle > 0]
    return max(found, key=lambda one: one.idle).name if found else None


def hopeful(standings: Sequence[Standing]) -> bool:
    """Whether memory will be free by itself: a model that may leave is in use, or on its way."""
    return any(one.may and one.residence != "parked" and not one.starved for one in standings)


def until_due(idle: float, after: float) -> float:
    """Seconds until a model can have been idle for ``after`` seconds; at least a hundredth of them, so that
    one that is busy all the time is not asked after all the time."""
    return max(after - idle, after / 100)

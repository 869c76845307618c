"""When to dispatch the step that follows the running one: as late as the device is never left waiting. Pure.

What is dispatched cannot be taken back, so a step dispatched early keeps whoever arrives next waiting for
one step more. The running step's end is predicted from the shortest of like steps before it, and the next
one follows a margin earlier. The margin is learned from the steps that another followed: it grows at once
when that one was held back and the device was found idle, and shrinks slowly while the host waits for the
device for longer than it has to. A driver whose steps are computed while they are dispatched is always found
idle, so its margin soon exceeds its steps and it is never made to wait. A step that can tell is looked at now
and then, so one that ends sooner than predicted is not waited for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from math import inf
from typing import Any

from llmos.drivers.sdk.driver import Pending

Clock = Callable[[], float]

KINDS = 256
FIRST_MARGIN = 2.0e-3  # seconds
MIN_MARGIN = 1.0e-3
MAX_MARGIN = 1.0
IDLE = 2.0e-4  # a result that was waited for no longer than this was there already
ENOUGH = 1.0e-3  # seconds of waiting for the device that are no reason to cut the margin
GROW = 1.5
SHRINK = 0.05
FOLLOW = 0.05
TICK = 1.0e-3  # what the loop's clock can tell apart
GLANCE = 2.0e-3  # seconds between two looks at a step that runs


class Timing:
    """What the steps of one device took, by kind, and how long before their end the next is dispatched."""

    def __init__(self) -> None:
        self._shortest: OrderedDict[Hashable, float] = OrderedDict()
        self.margin = FIRST_MARGIN
        self.completed = 0.0  # when the last result was there

    def pause(self, kind: Hashable, running: float) -> float:
        """Whole milliseconds, in seconds, until the step after one that is ``running`` for so long is due."""
        left = self._shortest.get(kind, 0.0) - self.margin - running
        return max(0.0, left // TICK * TICK)

    def took(self, kind: Hashable, seconds: float, waited: float, alone: bool = False) -> None:
        """A step took so long; its result was waited for so long, or had been there before if not at all.

        Of a step that was dispatched to an idle device (``alone``) that says how long it took at most.
        """
        if waited <= IDLE:
            if alone and kind in self._shortest:
                self._shortest[kind] = min(seconds, self._shortest[kind])
            return
        shortest = self._shortest.pop(kind, seconds)
        self._shortest[kind] = min(seconds, shortest + FOLLOW * (seconds - shortest))
        if len(self._shortest) > KINDS:
            self._shortest.popitem(last=False)

    def followed(self, waited: float, held: bool) -> None:
        """Another step was dispatched behind one whose result was waited for so long after that; ``held``
        if it could have been dispatched earlier."""
        if waited > IDLE:
            self.margin = max(MIN_MARGIN, self.margin - SHRINK * max(0.0, min(waited, self.margin) - ENOUGH))
        elif held:
            self.margin = min(MAX_MARGIN, GROW * self.margin)


class Timed:
    """A dispatched step: its result, and a note to ``timing`` of what it took. ``clock`` is in seconds."""

    def __init__(self, timing: Timing, kind: Hashable, result: Callable[[], Any], clock: Clock) -> None:
        self._timing, self._kind, self._result, self._clock = timing, kind, result, clock
        self._at = clock()
        self._held = self._followed = False

    def __call__(self) -> Any:
        asked = self._clock()
        result = self._result()
        now = self._clock()
        alone = self._at >= self._timing.completed
        began, self._timing.completed = max(self._at, self._timing.completed), now
        self._timing.took(self._kind, now - began, now - asked, alone)
        if self._followed:
            self._timing.followed(now - asked, self._held)
        return result

    def follow(self) -> None:
        """Another step is being dispatched behind this one."""
        self._followed = True

    def ready(self) -> bool:
        """Whether the result is there, as far as the driver can tell."""
        return not isinstance(self._result, Pending) or self._result.ready()

    def pause(self) -> float:
        """Seconds until the step behind this one is due, or until to ask again; it is alone on the device."""
        longest = inf
        if isinstance(self._result, Pending):
            if self._result.overlaps or self._result.ready():
                return 0.0
            longest = GLANCE
        running = self._clock() - max(self._at, self._timing.completed)
        pause = self._timing.pause(self._kind, running)
        self._held = self._held or pause > 0.0
        return min(pause, longest)

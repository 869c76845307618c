"""Simulated time: what happens when, in order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Events at times in seconds; those of one time happen in the order in which they were entered."""

    def __init__(self, latency: float) -> None:
        self.now = 0.0
        self.latency = latency
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def soon(self, event: Callable[[], None]) -> None:
        """A message arrives after its latency; messages keep their order."""
        self.at(self.now + self.latency, event)

    def run(self, until: float = float("inf")) -> None:
        """Run until nothing is left to happen, or until a time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

"""What a tenant's flood leaves to others who ask for little: slots, and steps no longer than before. Pure.

No order of service helps who is served at once and finds each step longer than before. So while a tenant
is here whose interactive work does not wait, or was a moment ago, no other tenant's interactive work takes
more than its weight times ``SHARE`` of the slots. The rest stays empty for those who come. Where all of
them wait, nobody is held back: then virtual token counters say who is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

SHARE = 0.25
LINGER = 10.0  # seconds that a tenant counts as here after its last task


class Presence:
    """The tenants with interactive work; times in seconds."""

    def __init__(self) -> None:
        self._tasks: Counter[str] = Counter()
        self._left: dict[str, float] = {}

    def enter(self, tenant: str) -> None:
        """A task came."""
        self._tasks[tenant] += 1
        self._left.pop(tenant, None)

    def leave(self, tenant: str, now: float) -> None:
        """A task ended, or went to another band."""
        self._tasks[tenant] -= 1
        if not self._tasks[tenant]:
            del self._tasks[tenant]
            self._left[tenant] = now

    def light(self, tenant: str, waits: Callable[[str], bool], now: float) -> bool:
        """Whether another than ``tenant`` is here, or was, that has nothing waiting."""
        while self._left and now - (gone := next(iter(self._left.items())))[1] > LINGER:
            del self._left[gone[0]]
        others = len(self._left) - (tenant in self._left)
        return others > 0 or any(each != tenant and not waits(each) for each in self._tasks)

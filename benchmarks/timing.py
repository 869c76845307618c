"""How first tokens are timed, of ours and of a peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

REST_S = 0.5


def first_tokens(once: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median seconds of prompts one right after the other, and ``REST_S`` apart; ``once`` gives those of one.

    A first one each time is not counted.
    """

    def median(rest: float) -> float:
        times = []
        for _ in range(repeats + 1):
            time.sleep(rest)
            times.append(once())
        return statistics.median(times[1:])

    return median(0.0), median(REST_S)

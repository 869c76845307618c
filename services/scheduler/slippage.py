"""By how much steps take longer than was forecast, in all: learned from runs of 1, 2, 4 ... steps. Pure.

What is forecast for one step and what for a hundred is wrong by different shares: noise and late messages
cancel out or weigh little in a long run, a wrong fit and what passes between quanta do not. So whoever
promises an end some steps ahead wants the share for that many. It is an expectile of the runs so far (Newey
and Powell, Econometrica 55, 1987): one that was exceeded moves it thirty times as far as one that was not,
so about one in thirty is worse.
"""

from __future__ import annotations

SIZES = 8  # runs of 1, 2 ... 128 steps
UP, DOWN = 0.3, 0.01  # how far a run moves what is known of its size
MOST = 4.0  # of what was forecast: who took longer than that was kept from running at all
FIRST = 0.02  # before anything is known
BITS = 32

Run = tuple[float, float]  # seconds forecast, and taken


class Slippage:
    """Shares of what was forecast, by the number of steps; ``late`` are the seconds by which single steps
    are: what any one message may be."""

    def __init__(self) -> None:
        self.late = 0.0
        self._shares = [FIRST]
        self._halves: list[Run | None] = [None] * SIZES

    def took(self, forecast: float, taken: float) -> None:
        """A step took so many seconds after the one before it, and had been forecast to take others."""
        run = (forecast, taken)
        late = min(MOST * forecast, taken - forecast)
        self.late = max(0.0, self.late + (UP if late > self.late else DOWN) * (late - self.late))
        for size in range(SIZES):
            self._note(size, run)
            half, self._halves[size] = self._halves[size], None
            if half is None:
                self._halves[size] = run
                return
            run = (half[0] + run[0], half[1] + run[1])

    def interrupt(self) -> None:
        """The next step does not follow the last one."""
        self._halves = [None] * SIZES

    def share(self, steps: float) -> float:
        """How much longer so many steps may take than forecast, as a part of that; at least 0."""
        size = min(len(self._shares), max(1, int(steps)).bit_length()) - 1
        return max(0.0, self._shares[size])

    def stretches(self) -> list[float]:
        """One and the share, by the bits of a number of steps."""
        return [1.0 + self.share(1 << max(0, bits - 1)) for bits in range(BITS)]

    def _note(self, size: int, run: Run) -> None:
        slipped = min(MOST, run[1] / run[0] - 1.0)
        if size == len(self._shares):
            # Longer runs are as wrong as the longest so far, until more is known.
            self._shares.append(self._shares[-1])
        share = self._shares[size]
        self._shares[size] += (UP if slipped > share else DOWN) * (slipped - share)

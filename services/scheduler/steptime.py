"""How long a step takes: fitted while running, from measured steps. Pure.

``seconds = base + row * rows + context * tokens read + prefill * tokens prefilled + slope * max(0, rows +
tokens prefilled - knot)``, all coefficients at least zero (a step never gets shorter by work, and no token
is cheaper than those before it). The last term is what a GPU does: while products wait for the weights to be
read, another token in them costs nothing; from the knot on each costs its arithmetic. It is used only where
it explains what a straight line does not.

Measurements are kept as averages in cells of similar steps, so that a long quiet decode does not make the
model forget what prefill costs, memory is bounded, and one slow step (a compilation, a page fault) weighs no
more than its cell. ``drift`` follows a device that has become slower or faster than its cells say. The fit is
weighted least squares of the relative error (``fitting``). What it leaves unexplained is for ``slippage``.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import accumulate, pairwise
from math import inf

from llmos.services.scheduler.fitting import Moments, bent, straight
from llmos.services.scheduler.slippage import Slippage

CELLS = 256
SMOOTHING = 0.1
TRUSTED = 4  # measurements from which on a cell has its full weight
OUTLIER = 2.0
FOLLOW = 0.02
REFIT = 64  # measurements between two fits
NEW = 8  # that one of a new kind counts for
SURPRISE = 0.1  # relative error of the estimate for one of a new kind that has the fit done at once
TRIES = 3  # knots that are tried in each fit, beside the one there is
EXACT = 3e-3  # relative error of a straight line that is good enough
BETTER = 0.7  # of a straight line's squared error: what a knot has to leave at most
SCALES = (1.0, 1e2, 1e5, 1e3)  # so that the unknowns are of one size

Cell = tuple[int, int, int, int]


class StepTimes:
    """The step-time model of one host. ``observe`` steps, then ask ``seconds``; 0.0 before the first."""

    def __init__(self) -> None:
        self._cells: OrderedDict[Cell, list[float]] = OrderedDict()
        self._solution = [0.0] * 5
        self.knot = inf
        self._turn = 0  # which knots are tried next
        self._steps = 0
        self._unfitted = 0  # measurements since the last fit
        self._last = 0.0  # when the step before arrived, if the device has worked since
        self.drift = 1.0  # a moving average of measured over estimated
        self.slippage = Slippage()

    def __bool__(self) -> bool:
        return bool(self._cells)

    def observe(self, rows: int, context: int, prefilled: int, seconds: float, now: float = 0.0) -> None:
        """A step of so many decoding rows, tokens of context and prefilled tokens took so long, and its
        result was here at ``now`` (if that is known)."""
        if seconds <= 0.0:
            return
        key = rows.bit_length(), context.bit_length(), prefilled.bit_length(), _octave(rows + prefilled)
        known, surprising = self._cells.get(key), False
        if (estimate := self._raw(rows, context, prefilled)) > 0.0:
            if self._last and now:
                self.slippage.took(estimate * self.drift, now - self._last)
            if known is not None:
                self.drift += FOLLOW * (min(seconds / estimate, OUTLIER * self.drift) - self.drift)
            surprising = abs(seconds / estimate - 1.0) > SURPRISE
        self._last = now
        if known is None:
            if len(self._cells) >= CELLS:
                self._cells.popitem(last=False)
            self._cells[key] = [float(rows), float(context), float(prefilled), seconds, 1.0]
        else:
            _blend(known, rows, context, prefilled, seconds)
            self._cells.move_to_end(key)
        self._steps += 1
        # A step of a new kind says more than another of many, and at first each says much.
        self._unfitted += 1 if known is not None else REFIT if surprising else NEW
        if self._unfitted >= min(REFIT, 1 + self._steps // 4):
            self._fit()

    def rest(self) -> None:
        """The device has nothing to do: the time until its next step says nothing of that."""
        self._last = 0.0
        self.slippage.interrupt()

    def seconds(self, rows: float, context: float, prefilled: float) -> float:
        """The estimate for a step."""
        return self._raw(rows, context, prefilled) * self.drift

    def prefill_room(self, rows: float, context: float, budget: float) -> float:
        """How many tokens may be prefilled in a step that has to stay under ``budget`` seconds."""
        left = budget / self.drift - self._raw(rows, context, 0)
        each, slope = self._solution[3] / SCALES[3], self._solution[4] / SCALES[3]
        flat = max(0.0, self.knot - rows) if slope else inf
        if left <= 0.0 or left <= each * flat:
            return left / (each or slope) if each or slope else inf
        return flat + (left - each * flat) / (each + slope) if slope else inf

    def _raw(self, rows: float, context: float, prefilled: float) -> float:
        base, row, read, prefill, slope = self._solution
        total = base + row * rows / SCALES[1] + read * context / SCALES[2] + prefill * prefilled / SCALES[3]
        return total + slope * max(0.0, rows + prefilled - self.knot) / SCALES[3] if slope else total

    def _fit(self) -> None:
        """A straight line, or one with a knot between two sizes of steps: the best of the one there is and
        of some others by turns."""
        sizes: dict[int, Moments] = {}
        for key, (rows, context, prefilled, seconds, count) in self._cells.items():
            x = rows / SCALES[1], context / SCALES[2], prefilled / SCALES[3]
            sizes.setdefault(key[3], Moments()).add(*x, seconds, min(count, TRUSTED) / (seconds * seconds))
        self._unfitted = 0
        ordered = [sizes[octave] for octave in sorted(sizes)]
        beyond = [*accumulate(reversed(ordered))][::-1]
        found = straight(total := beyond[0])
        self._solution, best = [*found.solution, 0.0], found.error
        if best > EXACT * EXACT * total.square:
            self._bend(ordered, beyond, BETTER * best)

    def _bend(self, ordered: list[Moments], beyond: list[Moments], most: float) -> None:
        """Put a knot where it leaves the least error, if that is less than ``most``: between two sizes of
        steps, of which ``beyond`` are the sums of each and of all that are larger."""
        gaps = [(low.tokens, high.tokens) for low, high in pairwise(ordered)]
        kept = [i for i, (low, high) in enumerate(gaps) if low <= self.knot / SCALES[3] <= high]
        tried = {*kept, *((self._turn + i) % len(gaps) for i in range(min(TRIES, len(gaps))))}
        self._turn += TRIES
        self.knot = inf
        for i in tried:
            found = bent(beyond[0], beyond[i + 1], *gaps[i], most)
            if found.error < most:
                most, self._solution, self.knot = found.error, found.solution, SCALES[3] * found.knot


def _blend(cell: list[float], rows: int, context: int, prefilled: int, seconds: float) -> None:
    """Average a step into its cell. One that took less than half as long as those before says that they were
    compiling; one that takes more than twice as long weighs no more than that."""
    if seconds < cell[3] / OUTLIER:
        cell[:] = [float(rows), float(context), float(prefilled), seconds, 1.0]
        return
    cell[4] += 1.0
    part = max(1.0 / cell[4], SMOOTHING)
    for i, value in enumerate((rows, context, prefilled, min(seconds, OUTLIER * cell[3]))):
        cell[i] += part * (value - cell[i])


def _octave(tokens: int) -> int:
    """A number of tokens in quarters of octaves."""
    bits = tokens.bit_length()
    return 4 * bits + (tokens >> (bits - 3) & 3) if bits > 2 else tokens

"""How long a step takes: fitted while running, from measured steps. Pure.

``seconds = base + row * rows + context * tokens read + prefill * tokens prefilled``, all coefficients at
least zero (a step never gets shorter by work). Measurements are kept as averages in cells of similar steps,
so that a long quiet decode does not make the model forget what prefill costs, memory is bounded, and one
slow step (a compilation, a page fault) weighs no more than its cell. ``drift`` follows a device that has
become slower or faster than its cells say. The fit is weighted least squares of
the relative error under that constraint, by coordinate descent on the normal equations.
"""

from __future__ import annotations

from collections import OrderedDict

CELLS = 512
SMOOTHING = 0.1
TRUSTED = 4  # measurements of a cell before outliers are cut
OUTLIER = 2.0
FOLLOW = 0.02
REFIT = 64
SWEEPS = 30
MARGIN = 3.0  # mean deviations that a cautious estimate adds
SCALES = (1.0, 1e2, 1e5, 1e3)  # so that the four unknowns are of one size

Cell = tuple[int, int, int]


class StepTimes:
    """The step-time model of one host. ``observe`` steps, then ask ``seconds``; 0.0 before the first."""

    def __init__(self) -> None:
        self._cells: OrderedDict[Cell, list[float]] = OrderedDict()
        self._normal = [[0.0] * 4 for _ in range(4)]
        self._right = [0.0] * 4
        self._solution = [0.0] * 4
        self._unfitted = 0  # measurements since the last fit
        self.drift = 1.0  # a moving average of measured over estimated
        self.deviation = 0.0  # mean relative distance of a step from its estimate

    def __bool__(self) -> bool:
        return bool(self._cells)

    def observe(self, rows: int, context: int, prefilled: int, seconds: float) -> None:
        """A step of so many decoding rows, tokens of context and prefilled tokens took so long."""
        if seconds <= 0.0:
            return
        if (estimate := self._raw(rows, context, prefilled)) > 0.0:
            missed = abs(seconds / (estimate * self.drift) - 1.0)
            self.deviation += FOLLOW * (min(1.0, missed) - self.deviation)
            self.drift += FOLLOW * (min(seconds / estimate, OUTLIER * self.drift) - self.drift)
        key = (rows.bit_length(), context.bit_length(), prefilled.bit_length())
        cell = self._cells.get(key)
        if cell is None:
            if len(self._cells) >= CELLS:
                self._weigh(self._cells.popitem(last=False)[1], -1.0)
            cell = self._cells[key] = [float(rows), float(context), float(prefilled), seconds, 1.0]
        else:
            self._weigh(cell, -1.0)
            self._blend(cell, rows, context, prefilled, seconds)
            self._cells.move_to_end(key)
        self._weigh(cell, 1.0)
        self._unfitted += 1
        if self._unfitted >= REFIT:
            self._fit()

    def seconds(self, rows: float, context: float, prefilled: float, *, cautious: bool = False) -> float:
        """The estimate for a step; ``cautious`` adds what steps were seen to deviate."""
        if self._unfitted:
            self._fit()
        total = self._raw(rows, context, prefilled) * self.drift
        return total * self.caution if cautious else total

    @property
    def caution(self) -> float:
        """A cautious estimate over a plain one."""
        return max(1.0, 1.0 / self.drift) * (1.0 + MARGIN * self.deviation)

    def prefill_room(self, rows: float, context: float, budget: float) -> float:
        """How many tokens may be prefilled in a step that has to stay under ``budget`` seconds."""
        left = budget - self.seconds(rows, context, 0)
        each = self.drift * self._solution[3] / SCALES[3]
        return left / each if each > 0.0 else float("inf")

    def _raw(self, rows: float, context: float, prefilled: float) -> float:
        base, row, read, prefill = self._solution
        return base + row * rows / SCALES[1] + read * context / SCALES[2] + prefill * prefilled / SCALES[3]

    def _blend(self, cell: list[float], rows: int, context: int, prefilled: int, seconds: float) -> None:
        """Average a step into its cell; of the first few the fastest counts: others were compiling."""
        count = cell[4] = cell[4] + 1.0
        if count <= TRUSTED:
            if seconds < cell[3]:
                cell[:4] = [float(rows), float(context), float(prefilled), seconds]
            return
        seconds = min(seconds, OUTLIER * cell[3])
        for i, value in enumerate((rows, context, prefilled, seconds)):
            cell[i] += SMOOTHING * (value - cell[i])

    def _weigh(self, cell: list[float], sign: float) -> None:
        """Add a cell to the normal equations, or take it out again."""
        y = cell[3]
        x = (1.0, cell[0] / SCALES[1], cell[1] / SCALES[2], cell[2] / SCALES[3])
        weight = sign * min(cell[4], TRUSTED) / (y * y)
        for i in range(4):
            self._right[i] += weight * x[i] * y
            row = self._normal[i]
            for j in range(4):
                row[j] += weight * x[i] * x[j]

    def _fit(self) -> None:
        normal, right, solution = self._normal, self._right, self._solution
        for _ in range(SWEEPS):
            for i in range(4):
                if normal[i][i] <= 1e-12:
                    continue
                rest = sum(normal[i][j] * solution[j] for j in range(4) if j != i)
                solution[i] = max(0.0, (right[i] - rest) / normal[i][i])
        self._unfitted = 0

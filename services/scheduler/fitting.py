"""Least squares for step times: a plane, or one that bends upwards from a number of tokens on. Pure.

All coefficients are at least zero (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23, on
the normal equations). For a bend, which cells are beyond it is given: then the two unknowns of ``slope *
(tokens - knot)`` are linear, and the knot is their quotient (Muggeo, Statistics in Medicine 22, 2003). Units
are those of the caller, in which tokens = ``ROWS`` * rows + prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from typing import NamedTuple

ROWS = 0.1  # rows are in hundreds, prefilled tokens in thousands
TINY = 1e-9
SINGULAR = 1e-11

Matrix = list[list[float]]


class Moments:
    """Weighted sums of products of (1, rows, context, prefilled, seconds) over steps: the upper triangle of
    their matrix, line by line."""

    __slots__ = ("sums",)

    def __init__(self, sums: list[float] | None = None) -> None:
        self.sums = sums or [0.0] * 15

    def add(self, rows: float, context: float, prefilled: float, seconds: float, weight: float) -> None:
        r, c, p, s = weight * rows, weight * context, weight * prefilled, weight * seconds
        more = (
            *(weight, r, c, p, s),
            *(r * rows, r * context, r * prefilled, r * seconds),
            *(c * context, c * prefilled, c * seconds),
            *(p * prefilled, p * seconds, s * seconds),
        )
        self.sums = [a + b for a, b in zip(self.sums, more, strict=True)]

    def __add__(self, other: Moments) -> Moments:
        return Moments([a + b for a, b in zip(self.sums, other.sums, strict=True)])

    def matrix(self) -> Matrix:
        (n, r, c, p, s, rr, rc, rp, rs, cc, cp, cs, pp, ps, ss) = self.sums
        return [
            [n, r, c, p, s],
            [r, rr, rc, rp, rs],
            [c, rc, cc, cp, cs],
            [p, rp, cp, pp, ps],
            [s, rs, cs, ps, ss],
        ]

    @property
    def square(self) -> float:
        """The weighted sum of squared seconds: what an error is a part of."""
        return self.sums[14]

    @property
    def tokens(self) -> float:
        """The weighted mean of the tokens computed in a step."""
        return (ROWS * self.sums[1] + self.sums[3]) / self.sums[0]


class Fit(NamedTuple):
    """Coefficients of (1, rows, context, prefilled), for a bend also the slope and the knot from which it
    rises; the weighted sum of squared errors."""

    solution: list[float]
    error: float
    knot: float = inf


def straight(total: Moments) -> Fit:
    """The plane that fits best."""
    *lines, right = total.matrix()
    return _fit([line[:4] for line in lines], right[:4], right[4])


def bent(total: Moments, beyond: Moments, low: float, high: float, most: float) -> Fit:
    """The best fit with a knot between ``low`` and ``high``, where ``beyond`` are the sums of the steps that
    have more tokens; or any other with an error of ``most`` or more."""
    free = _with(total, beyond, [(0.0, ROWS, 0.0, 1.0), (-1.0, 0.0, 0.0, 0.0)])
    slope, product = free.solution[4:]
    if slope > 0.0 and low <= product / slope <= high:
        return Fit(free.solution[:5], free.error, product / slope)
    if free.error >= most:
        return free
    fits = [(_with(total, beyond, [(-knot, ROWS, 0.0, 1.0)]), knot) for knot in (low, high)]
    (solution, error, _), knot = min(fits, key=lambda each: each[0].error)
    return Fit(solution, error, knot)


def _with(total: Moments, beyond: Moments, more: list[tuple[float, ...]]) -> Fit:
    """A fit with more unknowns: each a combination of the others that is zero but ``beyond``."""
    lines, past = total.matrix(), beyond.matrix()
    gram = [[*line[:4], *([0.0] * len(more))] for line in lines[:4]]
    gram += [[0.0] * (4 + len(more)) for _ in more]
    right = lines[4][:4]
    for i, combination in enumerate(more):
        along = [_dot(combination, line) for line in past]
        right.append(along[4])
        for j in range(4):
            gram[4 + i][j] = gram[j][4 + i] = along[j]
        for j, other in enumerate(more):
            gram[4 + i][4 + j] = _dot(other, along)
    return _fit(gram, right, total.square)


def _fit(gram: Matrix, right: list[float], square: float) -> Fit:
    solution = nonnegative(gram, right)
    lines = (x * (_dot(line, solution) - 2.0 * b) for x, line, b in zip(solution, gram, right, strict=True))
    return Fit(solution, max(0.0, square + sum(lines)))


def nonnegative(gram: Matrix, right: list[float]) -> list[float]:
    """The x of at least zero that minimizes x' gram x - 2 right' x; of several one with few unknowns, and the
    first of them for a start."""
    size = len(right)
    if (found := _solve(gram, right, range(size))) is not None and min(found) >= 0.0:
        return found
    x, chosen = [0.0] * size, list[int]()
    left = {i for i in range(size) if gram[i][i] > 0.0}
    least = TINY * max((right[i] / sqrt(gram[i][i]) for i in left), default=0.0)
    for _ in range(4 * size):
        gains = {i: (right[i] - _dot(gram[i], x)) / sqrt(gram[i][i]) for i in left.difference(chosen)}
        best = 0 if 0 in gains and not chosen else max(gains, key=gains.__getitem__, default=-1)
        if best < 0 or gains[best] <= least:
            break
        chosen.append(best)
        if not _settle(gram, right, x, chosen):
            chosen.remove(best)
        if best not in chosen:
            left.remove(best)
    return x


def _settle(gram: Matrix, right: list[float], x: list[float], chosen: list[int]) -> bool:
    """Go to the best x of the chosen unknowns, and drop those that reach zero on the way; False where they
    cannot be told apart."""
    while chosen:
        found = _solve(gram, right, chosen)
        if found is None:
            return False
        ways = [
            (x[i] / (x[i] - new) if x[i] > new else 0.0, i)
            for i, new in zip(chosen, found, strict=True)
            if new <= 0.0
        ]
        part, first = min(ways, default=(1.0, -1))
        for i, new in zip(chosen, found, strict=True):
            x[i] += part * (new - x[i])
        if first < 0:
            return True
        x[first] = 0.0
        chosen[:] = [i for i in chosen if x[i] > 0.0]
    return True


def _solve(gram: Matrix, right: list[float], chosen: Sequence[int]) -> list[float] | None:
    """Gaussian elimination; the matrix is positive definite, so no pivot is looked for."""
    lines = [[*(gram[i][j] for j in chosen), right[i]] for i in chosen]
    size = len(lines)
    for k, line in enumerate(lines):
        if line[k] <= SINGULAR * gram[chosen[k]][chosen[k]]:
            return None
        for below in lines[k + 1 :]:
            if factor := below[k] / line[k]:
                for j in range(k, size + 1):
                    below[j] -= factor * line[j]
    for k in reversed(range(size)):
        line = lines[k]
        line[size] = (line[size] - sum(line[j] * lines[j][size] for j in range(k + 1, size))) / line[k]
    return [line[size] for line in lines]


def _dot(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=False))

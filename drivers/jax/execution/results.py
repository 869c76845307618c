"""What programs made in a step, as the message that tells of it; and what the host learns from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llmos.drivers.jax.execution.ledger import Slot
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.sampling.sampling import REASONS
from llmos.drivers.sdk.driver import Pending, PendingStep
from llmos.drivers.sdk.messages import Step

Served = list[tuple[int, int, Slot]]
"""(row, slot number, slot) for each that a program served."""


class Output(NamedTuple):
    """Whom a program served, its packed result, and how many guesses it verified (-1: it had none to make).

    The result is [2, rows]: token and finish; where there were guesses it is that of ``verification.accept``.
    """

    served: Served
    packed: jax.Array
    guesses: int = -1


class Results:
    """Resolves the steps of one replica, in the order of their dispatch."""

    def __init__(self, replica: Replica, clock: Callable[[], float]) -> None:
        self._replica = replica
        self._clock = clock
        self._completed = 0.0

    def pending(
        self, quantum: int, index: int, outputs: list[Output], begun: float, timed: bool
    ) -> PendingStep:
        """A step of a quantum that was dispatched at ``begun``; ``timed`` says that it only decodes."""
        resolve = partial(self._resolve, quantum, index, outputs, begun, timed)
        arrays: list[Any] = [output.packed for output in outputs]
        ready = lambda: all(array.is_ready() for array in arrays)  # noqa: E731
        return Pending(resolve, ready, overlaps=self._replica.programs.spec.place.stages > 1)

    def _resolve(self, quantum: int, index: int, outputs: list[Output], begun: float, timed: bool) -> Step:
        results = [(served, np.asarray(packed), guesses) for served, packed, guesses in outputs]
        now = self._clock()
        since, self._completed = max(begun, self._completed), now
        step = Step(quantum, index, [], [], [], round((now - since) * 1e6))
        for served, packed, guesses in results:
            if guesses >= 0:
                self._learn(served, packed, guesses, now - since if timed else 0.0)
                packed = packed[:-2]
            self._collect(served, packed, step)
        return step

    def _learn(self, served: Served, packed: np.ndarray, guesses: int, seconds: float) -> None:
        """Learn from a step that may have verified guesses how many tokens each slot really gained."""
        gained = (packed[:-3] >= 0).sum(axis=0).tolist()
        trials, hits = packed[-2:].tolist()
        present, speculation = self._replica.ledger.slots, self._replica.speculation
        for row, number, slot in served:
            slot.length += gained[row] - 1
            if speculation is not None and present.get(number) is slot:
                speculation.observe(number, guesses, trials[row], hits[row])
        if speculation is not None and seconds:
            speculation.resolved(len(served), packed.shape[1], guesses, sum(gained), seconds)

    def _collect(self, served: Served, packed: np.ndarray, step: Step) -> None:
        """Add to a step the tokens of each slot and how it ended, which the ledger learns too."""
        slots, tokens = step.slots, step.tokens
        *columns, codes = packed.tolist()
        for row, number, slot in served:
            made = [column[row] for column in columns if column[row] >= 0]
            slots += [number] * len(made)
            tokens += made
            if code := codes[row]:
                step.finished.append((number, REASONS[code]))
                slot.finished = True
            if code and REASONS[code] == "error":
                self._replica.faulty += slot.table

"""What is told of a step, and what the host has learnt from it, without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmos.drivers.jax.execution.ledger import Slot
from llmos.drivers.jax.execution.results import Output, Results

STOPPED, FAILED = 1, 3


class Learning:
    """Speculation that notes what it is told."""

    def __init__(self) -> None:
        self.observed: list[tuple[int, ...]] = []
        self.told: list[tuple[Any, ...]] = []

    def observe(self, *seen: int) -> None:
        self.observed.append(seen)

    def resolved(self, *seen: Any) -> None:
        self.told.append(seen)


@pytest.fixture
def replica() -> Any:
    slots = {number: Slot([1, 2], 2, 30, "greedy", 2, 4, table=[10 + number]) for number in (5, 6)}
    programs = SimpleNamespace(spec=SimpleNamespace(place=SimpleNamespace(stages=1)))
    return SimpleNamespace(
        ledger=SimpleNamespace(slots=slots), programs=programs, speculation=Learning(), faulty=[]
    )


def served(replica: Any, *numbers: int) -> list[tuple[int, int, Slot]]:
    return [(row, number, replica.ledger.slots[number]) for row, number in enumerate(numbers)]


def output(replica: Any, packed: list[list[int]], guesses: int = -1) -> Output:
    made: Any = np.asarray(packed, np.int32)
    return Output(served(replica, 6, 5), made, guesses)


def test_a_step_tells_tokens_and_ends(replica: Any) -> None:
    packed = [[70, -1], [0, FAILED]]
    step = Results(replica, lambda: 1.0).pending(7, 2, [output(replica, packed)], 0.5, timed=True)()
    assert (step.quantum, step.index, step.slots, step.tokens) == (7, 2, [6], [70])
    assert step.finished == [(5, "error")]
    assert [replica.ledger.slots[number].finished for number in (5, 6)] == [True, False]
    assert replica.faulty == [15]


def test_the_parts_of_a_step_are_told_in_their_order(replica: Any) -> None:
    parts = [output(replica, [[70, 71], [0, STOPPED]]), output(replica, [[80, 81], [0, 0]])]
    step = Results(replica, lambda: 1.0).pending(1, 0, parts, 0.5, timed=False)()
    assert (step.slots, step.tokens, step.finished) == ([6, 5, 6, 5], [70, 71, 80, 81], [(5, "stop")])


def test_a_step_is_timed_from_the_end_of_the_one_before(replica: Any) -> None:
    now = iter([2.0, 5.0, 9.0])
    results = Results(replica, lambda: next(now))
    steps = [
        results.pending(1, index, [output(replica, [[1, 1], [0, 0]])], begun, timed=True)
        for index, begun in enumerate([1.0, 1.5, 8.0])
    ]
    assert [step().micros for step in steps] == [1_000_000, 3_000_000, 1_000_000]


def test_verified_guesses_are_counted_and_learnt_from(replica: Any) -> None:
    # Tokens of two positions, ends, trials and hits, of each row.
    packed = [[70, 71], [-1, 72], [0, 0], [1, 1], [0, 1]]
    step = Results(replica, lambda: 3.0).pending(1, 0, [output(replica, packed, 1)], 1.0, timed=True)()
    assert (step.slots, step.tokens) == ([6, 5, 5], [70, 71, 72])
    assert [replica.ledger.slots[number].length for number in (6, 5)] == [4, 5]
    assert replica.speculation.observed == [(6, 1, 1, 0), (5, 1, 1, 1)]
    assert replica.speculation.told == [(2, 2, 1, 3, 2.0)]


def test_of_a_slot_that_others_have_taken_nothing_is_learnt(replica: Any) -> None:
    packed = [[70, 71], [0, 0], [1, 1], [0, 1]]
    pending = Results(replica, lambda: 3.0).pending(1, 0, [output(replica, packed, 0)], 1.0, timed=False)
    del replica.ledger.slots[6]
    pending()
    assert replica.speculation.observed == [(5, 0, 1, 1)]
    assert replica.speculation.told == []

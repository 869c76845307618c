"""The order in which stages are given work: nobody waits for what is not needed yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from llmos.drivers.jax.pipeline.programs import Batch, PipelinePrograms
from llmos.drivers.jax.programs import Key

SLOTS = 4


class FakeStage:
    """Stage programs that note who is called with which slots."""

    def __init__(self, name: str, log: list[tuple[str, str, list[int]]]) -> None:
        self.name, self.log = name, log
        self.common = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.spec = SimpleNamespace(batch=SimpleNamespace(token=np.zeros(SLOTS + 1)))

    def get(self, key: Key) -> Any:
        def program(*arguments: Any) -> Any:
            rows = {"absorb": 1, "sample": 1, "decode": 3}.get(str(key[0]), 0)
            who = np.asarray(arguments[rows])[:2].tolist() if rows < len(arguments) and rows else []
            self.log.append((self.name, str(key[0]), who if self.name != "last" or rows == 1 else []))
            made = {"absorb": "first", "admit": self.name, "decode": ("caches", *[np.zeros(2)] * 2)}
            made["sample"] = ("last", None, np.zeros((2, 2), np.int32))
            result = made[str(key[0])]
            return result[:2] if self.name == "last" and key[0] == "decode" else result

        return program


@pytest.fixture
def log() -> list[tuple[str, str, list[int]]]:
    return []


@pytest.fixture
def programs(log: list[tuple[str, str, list[int]]]) -> PipelinePrograms:
    stages: Any = [FakeStage("first", log), FakeStage("last", log)]
    return PipelinePrograms(stages)


def step(programs: PipelinePrograms, batch: Any, *parts: list[int]) -> None:
    """One decode step of microbatches."""
    for part in parts:
        rows = programs.place_rows(np.asarray(part, np.int32))
        _, logits = programs.get(("decode", 2))([[], []], [[], []], batch, rows)
        programs.get(("sample", "greedy", 2))(logits, rows, batch)


def entered(log: list[tuple[str, str, list[int]]]) -> list[tuple[str, list[int]]]:
    """What the first stage was given, in order."""
    return [(what, who) for name, what, who in log if name == "first"]


def test_a_microbatch_is_fed_before_the_others_tokens_are_awaited(programs: Any, log: Any) -> None:
    batch: Any = Batch("first", "last")  # type: ignore[arg-type]
    step(programs, batch, [0, 1], [2, 3])
    step(programs, batch, [0, 1], [2, 3])
    assert entered(log) == [
        ("decode", [0, 1]),
        ("decode", [2, 3]),
        ("absorb", [0, 1]),
        ("decode", [0, 1]),
        ("absorb", [2, 3]),
        ("decode", [2, 3]),
    ]
    assert [sorted(rows.slots) for rows, _ in batch.owed] == [[0, 1], [2, 3]]


def test_a_slot_that_is_taken_again_has_entered_what_it_was_owed(programs: Any, log: Any) -> None:
    batch: Any = Batch("first", "last")  # type: ignore[arg-type]
    step(programs, batch, [0, 1], [2, SLOTS])
    del log[:]
    programs.get(("admit",))(batch, np.asarray([[2, 1], [SLOTS, 0]]), np.zeros(2))
    assert [(name, what) for name, what, _ in log] == [
        ("first", "absorb"),
        ("first", "admit"),
        ("last", "admit"),
    ]
    assert [sorted(rows.slots) for rows, _ in batch.owed] == [[0, 1]]


def test_the_spare_row_owes_nothing(programs: Any) -> None:
    rows = programs.place_rows(np.asarray([3, SLOTS], np.int32))
    assert rows.slots == {3}


@pytest.mark.parametrize(
    ("rows", "parts"), [([], []), ([3], [[3]]), ([1, 2], [[1], [2]]), ([0, 1, 2], [[0], [1, 2]])]
)
def test_rows_are_cut_into_like_parts(programs: Any, rows: list[int], parts: list[list[int]]) -> None:
    assert programs.microbatches(rows) == parts

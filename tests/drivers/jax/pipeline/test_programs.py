"""The order in which stages are given work, played in simulated time: nobody waits for more than it needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from llmos.drivers.jax.execution.spec import Key
from llmos.drivers.jax.pipeline.programs import Batch, PipelinePrograms
from llmos.drivers.sdk.executor import IN_FLIGHT

SLOTS = 8


class Device:
    """A stage whose devices run what they are given in order; a decode takes a second, all else nothing.

    Every float that is passed on is the time at which it was computed.
    """

    def __init__(self) -> None:
        self.free = self.host = 0.0
        self.ran: list[str] = []
        self.common = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.spec = SimpleNamespace(first=0, batch=SimpleNamespace(token=np.zeros(SLOTS + 1)))

    def get(self, key: Key) -> Any:
        name = str(key[0])

        def program(*arguments: Any) -> Any:
            times = [float(x) for x in jax.tree.leaves(arguments) if np.issubdtype(x.dtype, np.floating)]
            self.free = max(self.free, self.host, *times) + (name == "decode")
            self.ran.append(name)
            end = np.float32(self.free)
            results = {"decode": ([], end, end), "sample": (end, None, end)}
            return results.get(name, end)

        return program


class Later(Device):
    """A stage that makes no plan."""

    def get(self, key: Key) -> Any:
        program = super().get(key)
        return (lambda *arguments: program(*arguments)[:2]) if key[0] == "decode" else program


def simulate(stages: int, rows: int, steps: int) -> float:
    """Seconds until the last token of some decode steps, at most two of them in flight."""
    devices: list[Any] = [Device(), *(Later() for _ in range(stages - 1))]
    programs, batch = PipelinePrograms(devices), new_batch()
    nothing: list[Any] = [[] for _ in devices]
    ends: list[float] = []
    for step in range(steps):
        for device in devices:
            device.host = ends[step - IN_FLIGHT] if step >= IN_FLIGHT else 0.0
        for part in programs.microbatches(list(range(rows))):
            index = programs.place_rows(np.asarray(part, np.int32))
            _, logits = programs.get(("decode", len(part)))(nothing, nothing, batch, index)
            _, _, packed = programs.get(("sample", "greedy", len(part)))(logits, index, batch)
        ends.append(float(packed))
    return ends[-1]


def new_batch() -> Any:
    first: Any = np.float32(0.0)
    return Batch(first, first)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_pipeline_is_filled_and_drained_once_and_not_in_every_step(stages: int) -> None:
    assert simulate(stages, rows=SLOTS, steps=20) == 20 * stages + stages - 1


def test_fewer_rows_than_stages_leave_stages_idle() -> None:
    assert simulate(4, rows=1, steps=20) == 20 * 4
    assert simulate(4, rows=3, steps=20) == 20 * 4 + 2


def test_rows_that_change_their_microbatch_are_waited_for_once() -> None:
    programs = PipelinePrograms([Device(), Later()])  # type: ignore[list-item]
    batch = new_batch()
    for parts in ([[0, 1], [2, 3]], [[0, 1, 2], [3]]):
        for part in parts:
            index = programs.place_rows(np.asarray(part, np.int32))
            _, logits = programs.get(("decode", len(part)))([[], []], [[], []], batch, index)
            programs.get(("sample", "greedy", len(part)))(logits, index, batch)
    first: Any = programs.stages[0]
    assert first.ran == ["decode", "decode", "absorb", "absorb", "decode", "decode"]
    assert [sorted(rows.slots) for rows, _ in batch.owed] == [[0, 1, 2], [3]]


def test_a_slot_that_is_taken_again_has_entered_what_it_was_owed() -> None:
    devices: list[Any] = [Device(), Later()]
    programs, batch = PipelinePrograms(devices), new_batch()
    for part in ([0, 1], [2, SLOTS]):
        index = programs.place_rows(np.asarray(part, np.int32))
        programs.get(("sample", "greedy", 2))(np.float32(0), index, batch)
    programs.get(("admit",))(batch, np.asarray([[2, 1], [SLOTS, 0]]), np.zeros(()))
    assert devices[0].ran == ["absorb", "admit"]
    assert [sorted(rows.slots) for rows, _ in batch.owed] == [[0, 1]]


def test_a_rehearsal_leaves_nothing_owed() -> None:
    devices: list[Any] = [Device(), Later()]
    programs, batch = PipelinePrograms(devices), new_batch()
    nobody = programs.place_rows(np.full(2, SLOTS, np.int32))
    programs.get(("sample", "greedy", 2))(np.float32(0), nobody, batch)
    programs.get(("decode", 2))([[], []], [[], []], batch, nobody)
    assert not batch.owed


@pytest.mark.parametrize(
    ("rows", "parts"), [([], []), ([3], [[3]]), ([1, 2], [[1], [2]]), ([0, 1, 2], [[0], [1, 2]])]
)
def test_rows_are_cut_into_like_parts(rows: list[int], parts: list[list[int]]) -> None:
    stages: list[Any] = [Device(), Later()]
    assert PipelinePrograms(stages).microbatches(rows) == parts

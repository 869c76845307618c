"""The programs of all stages as one: an engine calls them as it calls those of a whole model.

Weights and caches are lists of each stage's. Calls only dispatch: a stage's device runs what it is given in
that order, as soon as what the stage before makes of it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from llmos.drivers.jax.execution.programs import Programs
from llmos.drivers.jax.execution.spec import Key
from llmos.drivers.jax.execution.state import BatchState
from llmos.drivers.jax.sharding.placement import Program


class Rows(NamedTuple):
    """The ``slots`` that a program serves, and their numbers, with padding, on the first and last stage."""

    slots: frozenset[int]
    first: jax.Array
    last: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.last.shape


@jax.tree_util.register_dataclass
@dataclass
class Batch:
    """The batch where tokens are fed and where they are sampled; only the last stage samples by it.

    ``owed`` is what was sampled and the first stage has not entered, each slot at most once.
    """

    first: BatchState
    last: BatchState
    owed: list[tuple[Rows, jax.Array]] = field(default_factory=list)

    @property
    def tables(self) -> jax.Array:
        return self.last.tables


class PipelinePrograms(Programs):
    """The programs of ``stages``, by the keys of a whole model's."""

    def __init__(self, stages: list[Programs]) -> None:
        super().__init__(stages[-1].spec)
        self.stages = stages

    def microbatches(self, rows: list[int]) -> list[list[int]]:
        """As many as there are stages, of like size: of fewer, stages wait; more would read weights again."""
        count = min(len(self.stages), len(rows))
        bounds = [len(rows) * index // count for index in range(count + 1)] if rows else []
        return [rows[a:b] for a, b in pairwise(bounds)]

    def place_rows(self, rows: np.ndarray) -> Rows:
        spare = self.spec.batch.token.shape[0] - 1
        first, last = (jax.device_put(rows, stage.common) for stage in (self.stages[0], self.stages[-1]))
        return Rows(frozenset(rows.tolist()) - {spare}, first, last)

    def _compile(self, key: Key) -> Program:
        first, last = self.stages[0], self.stages[-1]
        match key[0]:
            case "decode":
                return partial(self._decode, [stage.get(key) for stage in self.stages])
            case "prefill":
                return partial(self._prefill, [stage.get(key) for stage in self.stages])
            case "sample":
                first.get(("absorb", key[2]))
                return partial(self._sample, last.get(key))
            case "admit":
                return partial(self._admit, first.get(key), last.get(key))
            case "grow":
                return partial(_both, first.get(key), last.get(key))
            case "scrub":
                return partial(_each, [stage.get(key) for stage in self.stages])
        return last.get(key)

    def _decode(
        self, programs: list[Program], weights: list[Any], caches: list[Any], batch: Batch, rows: Rows
    ) -> tuple[list[Any], jax.Array]:
        self._absorb(batch, rows.slots)
        cache, x, plan = programs[0](weights[0], caches[0], batch.first, rows.first)
        updated = [cache]
        for number, program in enumerate(programs[1:], 1):
            x, plan = jax.device_put((x, plan), self.stages[number].common)
            cache, x = program(weights[number], caches[number], x, plan)
            updated.append(cache)
        return updated, x

    def _prefill(
        self, programs: list[Program], weights: list[Any], caches: list[Any], chunk: np.ndarray
    ) -> tuple[list[Any], jax.Array]:
        cache, x = programs[0](weights[0], caches[0], chunk)
        updated = [cache]
        for number, program in enumerate(programs[1:], 1):
            x = jax.device_put(x, self.stages[number].common)
            cache, x = program(weights[number], caches[number], chunk, x)
            updated.append(cache)
        return updated, x

    def _sample(
        self, program: Program, logits: jax.Array, rows: Rows, batch: Batch, *tallies: Any
    ) -> tuple[Batch, Any, jax.Array]:
        batch.last, counted, packed = program(logits, rows.last, batch.last, *tallies)
        batch.owed.append((rows, jax.device_put(packed, self.stages[0].common)))
        return batch, counted, packed

    def _admit(
        self, first: Program, last: Program, batch: Batch, ints: np.ndarray, floats: np.ndarray
    ) -> Batch:
        # What a slot's sequence before was owed must not come after the new one.
        self._absorb(batch, ints[:, 0].tolist())
        return _both(first, last, batch, ints, floats)

    def _absorb(self, batch: Batch, slots: Iterable[int]) -> None:
        """Dispatch to the first stage what it is owed for any of ``slots``, and no more: it would wait."""
        # What was sampled for nobody, in a rehearsal, goes with the next.
        due = [not rows.slots or not rows.slots.isdisjoint(slots) for rows, _ in batch.owed]
        for wanted, (rows, packed) in zip(due, batch.owed):
            if wanted:
                program = self.stages[0].get(("absorb", rows.shape[0]))
                batch.first = program(batch.first, rows.first, packed)
        batch.owed = [each for wanted, each in zip(due, batch.owed) if not wanted]


def _both(first: Program, last: Program, batch: Batch, *arguments: Any) -> Batch:
    batch.first, batch.last = first(batch.first, *arguments), last(batch.last, *arguments)
    return batch


def _each(programs: list[Program], caches: list[Any], pages: np.ndarray) -> list[Any]:
    return [program(cache, pages) for program, cache in zip(programs, caches, strict=True)]

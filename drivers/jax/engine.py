"""One loaded model: its weights, caches and batch on the device, and the execution of quanta.

Nothing here waits for the device: programs are dispatched, and the tokens of a step are fetched by the
``PendingStep`` that the step yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.buckets import group
from llmos.drivers.jax.ledger import Ledger, Limits, Slot
from llmos.drivers.jax.programs import ADMIT_ROWS, GROW_ROWS, SCRUB_PAGES, Programs
from llmos.drivers.jax.sampling import REASONS, VARIANTS, Variant
from llmos.drivers.jax.state import (
    BatchState,
    Tallies,
    empty_tallies,
    pack_admission,
)
from llmos.drivers.sdk.checks import BIAS_LIMIT
from llmos.drivers.sdk.driver import PendingStep
from llmos.drivers.sdk.messages import Chunk, FinishReason, Quantum, Start, Step

Output = tuple[list[tuple[int, int, Slot]], jax.Array]
"""(row, slot number, slot) for each that a sampling program served, and its packed result [2, rows]."""


class Engine:
    """Executes quanta on one model; see ``Driver.execute`` for the contract."""

    def __init__(
        self,
        limits: Limits,
        programs: Programs,
        weights: Any,
        caches: list[Any],
        batch: BatchState,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits = limits
        self.ledger = Ledger(limits)
        self._programs = programs
        self._weights = weights
        self._caches = caches
        self._batch = batch
        self._tallies: Tallies | None = None
        self._tallied: set[int] = set()
        self._rows: dict[tuple[int, ...], jax.Array] = {}
        self._faulty: list[int] = []
        self._clock = clock
        self._completed = 0.0

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        """Check a quantum and apply its release, start and grow now; the iterator dispatches its steps."""
        self.ledger.check(quantum)
        self._scrub()
        self.ledger.enter(quantum)
        self._admit(quantum.start)
        self._grow(quantum)
        return self._steps(quantum)

    @property
    def caches(self) -> Any:
        """The shapes of the caches."""
        return self._programs.spec.caches

    def read_pages(self, numbers: list[int]) -> jax.Array:
        """Dispatch a gather: the pages as one block, as the steps dispatched so far leave them."""
        program = self._programs.get(("gather", len(numbers)))
        block: jax.Array = program(self._caches, np.asarray(numbers, np.int32))
        return block

    def write_pages(self, numbers: list[int], block: jax.Array) -> None:
        """Dispatch a scatter: the steps that follow find the block in these pages."""
        program = self._programs.get(("scatter", len(numbers)))
        self._caches = program(self._caches, block, np.asarray(numbers, np.int32))

    def close(self) -> None:
        """Stop what still runs in the background."""
        self._programs.close()

    def reset(self) -> None:
        """Empty all slots; what is on the device is overwritten when a slot is taken again."""
        self.ledger = Ledger(self.limits)

    def _steps(self, quantum: Quantum) -> Iterator[PendingStep]:
        chunks: dict[int, list[Chunk]] = {}
        for chunk in quantum.chunks:
            chunks.setdefault(chunk.step, []).append(chunk)
        last = max(chunks, default=-1)
        for index in range(quantum.steps):
            rows = self.ledger.ready(quantum.decode)
            if not rows and index > last:
                return
            begun = self._clock()
            outputs = [self._decode(rows)] if rows else []
            outputs += self._prefill(chunks.get(index, []))
            for _, packed in outputs:
                packed.copy_to_host_async()
            yield self._pending(quantum.id, index, outputs, begun)

    def _decode(self, rows: list[int]) -> Output:
        size, program = self._programs.decode(len(rows))
        index = self._row_index(rows, size)
        self._caches, logits = program(self._weights, self._caches, self._batch, index)
        for number in rows:
            self.ledger.advance(number)
        return self._sample(rows, index, logits)

    def _prefill(self, chunks: list[Chunk]) -> list[Output]:
        """Prefill the chunks of a step, those of like length together; sample where a prompt is complete."""
        outputs = []
        sizes = self._programs.spec.chunk_sizes
        for size, fresh, calls in group(chunks, sizes):
            for at in range(0, len(calls), self._programs.rows_for(size)[-1]):
                part = calls[at : at + self._programs.rows_for(size)[-1]]
                outputs += self._prefill_rows(part, size, fresh)
        return outputs

    def _prefill_rows(self, calls: list[Chunk], size: int, fresh: bool) -> list[Output]:
        height, program = self._programs.prefill(len(calls), size, fresh)
        chunk = np.zeros((height, size + 2), np.int32)
        for row, call in enumerate(calls):
            known = self.ledger.slots[call.slot].tokens
            chunk[row, : call.length] = known[call.start : call.start + call.length]
            chunk[row, -2:] = call.start, call.length
        index = self._row_index([call.slot for call in calls], height)
        self._caches, logits = program(self._weights, self._caches, self._batch, index, chunk)
        complete = [call.slot if self.ledger.fill(call) else self.limits.slots for call in calls]
        if all(slot == self.limits.slots for slot in complete):
            return []
        return [self._sample(complete, self._row_index(complete, height), logits)]

    def _sample(self, rows: list[int], index: jax.Array, logits: jax.Array) -> Output:
        slots = self.ledger.slots
        served = [(row, number, slots[number]) for row, number in enumerate(rows) if number in slots]
        variant: Variant = max((slot.variant for *_, slot in served), key=VARIANTS.index)
        program = self._programs.get(("sample", variant, index.shape[0]))
        if variant == "full":
            self._batch, self._tallies, packed = program(logits, index, self._batch, self._tallies)
        else:
            self._batch, _, packed = program(logits, index, self._batch)
        return served, packed

    def _pending(self, quantum: int, index: int, outputs: list[Output], begun: float) -> PendingStep:
        def resolve() -> Step:
            results = [(served, np.asarray(packed)) for served, packed in outputs]
            now = self._clock()
            since, self._completed = max(begun, self._completed), now
            slots, tokens, finished = self._collect(results)
            return Step(quantum, index, slots, tokens, finished, round((now - since) * 1e6))

        return resolve

    def _collect(
        self, results: list[tuple[list[tuple[int, int, Slot]], np.ndarray]]
    ) -> tuple[list[int], list[int], list[tuple[int, FinishReason]]]:
        slots, tokens, finished = [], [], []
        for served, packed in results:
            chosen, codes = packed.tolist()
            for row, number, slot in served:
                token, code = chosen[row], codes[row]
                if token >= 0:
                    slots.append(number)
                    tokens.append(token)
                if code:
                    finished.append((number, REASONS[code]))
                    slot.finished = True
                if code and REASONS[code] == "error":
                    self._faulty += slot.table
        return slots, tokens, finished

    def _row_index(self, rows: list[int], size: int) -> jax.Array:
        """Slot numbers padded with the spare row, kept on the device while the batch stays the same."""
        padded = (*rows, *[self.limits.slots] * (size - len(rows)))
        if padded not in self._rows:
            if len(self._rows) >= 4 * self.limits.slots + 16:
                self._rows.clear()
            self._rows[padded] = jnp.asarray(padded, jnp.int32)
        return self._rows[padded]

    def _admit(self, starts: list[Start]) -> None:
        program = self._programs.get(("admit",))
        for first in range(0, len(starts), ADMIT_ROWS):
            self._batch = program(self._batch, *self._admission(starts[first : first + ADMIT_ROWS]))
        for start in starts:
            penalised = self.ledger.slots[start.slot].variant == "full"
            if penalised or start.slot in self._tallied:
                self._tally(start)
            (self._tallied.add if penalised else self._tallied.discard)(start.slot)

    def _admission(self, starts: list[Start]) -> tuple[Any, Any]:
        width, spare = self._batch.tables.shape[1], self.limits.pages
        tables = [start.pages + [spare] * (width - len(start.pages)) for start in starts]
        tables += [[spare] * width] * (ADMIT_ROWS - len(starts))
        packed: tuple[Any, Any] = pack_admission(starts, ADMIT_ROWS, self.limits.slots, tables)
        return packed

    def _tally(self, start: Start) -> None:
        if self._tallies is None:
            self._tallies = empty_tallies(self.limits.slots, self.limits.vocab_size)
        tokens = np.zeros(self.limits.max_context, np.int32)
        tokens[: len(start.tokens)] = start.tokens
        ids = np.full(BIAS_LIMIT, self.limits.vocab_size, np.int32)
        values = np.zeros(BIAS_LIMIT, np.float32)
        ids[: len(start.sampling.logit_bias)] = list(start.sampling.logit_bias)
        values[: len(start.sampling.logit_bias)] = list(start.sampling.logit_bias.values())
        counts = (np.int32(start.prompt), np.int32(len(start.tokens)))
        program = self._programs.get(("tally",))
        self._tallies = program(self._tallies, np.int32(start.slot), tokens, *counts, ids, values)

    def _grow(self, quantum: Quantum) -> None:
        cells: list[tuple[int, int, int]] = []
        held = {growth.slot: self.ledger.slots[growth.slot].held for growth in quantum.grow}
        for growth in reversed(quantum.grow):
            held[growth.slot] -= len(growth.pages)
            first = held[growth.slot]
            cells += [(growth.slot, first + i, page) for i, page in enumerate(growth.pages)]
        program = self._programs.get(("grow",))
        for at in range(0, len(cells), GROW_ROWS):
            part = cells[at : at + GROW_ROWS]
            part += [(self.limits.slots + 1, 0, 0)] * (GROW_ROWS - len(part))
            self._batch = program(self._batch, *np.asarray(part, np.int32).T.copy())

    def _scrub(self) -> None:
        """Clear what is not finite from the pages of failed sequences, lest it spread to the next owner."""
        pages, self._faulty = self._faulty, []
        for at in range(0, len(pages), SCRUB_PAGES):
            part = pages[at : at + SCRUB_PAGES]
            part += [self.limits.pages + 1] * (SCRUB_PAGES - len(part))
            program = self._programs.get(("scrub",))
            self._caches = program(self._caches, np.asarray(part, np.int32))

"""One loaded model: its weights, caches and batch on the device, and the execution of quanta.

Nothing here waits for the device: programs are dispatched, and the tokens of a step are fetched by the
``PendingStep`` that the step yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax.buckets import group, pieces
from llmos.drivers.jax.forward import heading
from llmos.drivers.jax.ledger import Ledger, Limits, Slot
from llmos.drivers.jax.pool import Own, Share
from llmos.drivers.jax.programs import (
    ADAPTED,
    ADMIT_ROWS,
    GROW_ROWS,
    PIECE,
    SCRUB_PAGES,
    Key,
    Programs,
    plain,
)
from llmos.drivers.jax.sampling import REASONS, VARIANTS, Variant
from llmos.drivers.jax.speculating import Speculation
from llmos.drivers.jax.state import (
    BatchState,
    Tallies,
    empty_tallies,
    pack_admission,
)
from llmos.drivers.jax.verification import no_guess
from llmos.drivers.sdk.checks import BIAS_LIMIT
from llmos.drivers.sdk.driver import Pending, PendingStep
from llmos.drivers.sdk.messages import Chunk, FinishReason, Quantum, Start, Step

Served = list[tuple[int, int, Slot]]
"""(row, slot number, slot) for each that a program served."""

Output = tuple[Served, jax.Array, int]
"""Whom a program served, its packed result, and how many guesses it verified (-1: it had none to make).

The result is [2, rows]: token and finish; where there were guesses it is that of ``verification.accept``.
"""


class Engine:
    """Executes quanta on one replica of a model; see ``Driver.execute`` for the contract.

    ``common`` is the sharding of what all devices of the replica have, such as ``batch``; ``make`` allocates
    caches and a batch like those given, for a model that was ``parked``.
    """

    def __init__(
        self,
        limits: Limits,
        programs: Programs,
        weights: Any,
        caches: Own | Share,
        batch: BatchState,
        common: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        speculation: Speculation | None = None,
        make: Callable[[], tuple[Own | Share, Any]] | None = None,
    ) -> None:
        self.limits = limits
        self.ledger = Ledger(limits)
        self.unrehearsed: list[Key] = []
        self.programs = programs
        self._keep(weights)
        self._held = caches
        self._batch = batch
        self._common = common
        self._tallies: Tallies | None = None
        self._tallied: set[int] = set()
        self._rows: dict[tuple[int, ...], jax.Array] = {}
        self._entering: list[Start] = []
        self._faulty: list[int] = []
        self._clock = clock
        self.speculation = speculation
        self.parked = False
        self._make = make
        self._completed = 0.0
        caches.cleaners.append(self._scrub)

    @property
    def _caches(self) -> Any:
        """What programs take, and give back."""
        return self._held.caches

    @_caches.setter
    def _caches(self, caches: Any) -> None:
        self._held.caches = caches

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        """Check a quantum and apply its release, start and grow now; the iterator dispatches its steps.

        Starts reach the device behind the first prompts, which need nothing of the batch and are waited for.
        """
        self.ledger.check(quantum)
        for scrub in self._held.cleaners:
            scrub()
        self.ledger.enter(quantum)
        self._entering = quantum.start
        if quantum.grow:
            self._admit()
            self._grow(quantum)
        return self._steps(quantum)

    def read_pages(self, numbers: list[int]) -> Sequence[jax.Array]:
        """Dispatch a gather: the pages' rows, as the steps dispatched so far leave them."""
        program = self.programs.get(("gather", len(numbers)))
        rows: Sequence[jax.Array] = program(self._caches, np.asarray(numbers, np.int32))
        return rows

    def write_pages(self, numbers: list[int], rows: Sequence[jax.Array]) -> None:
        """Dispatch a scatter: the steps that follow find the rows in these pages."""
        program = self.programs.get(("scatter", len(numbers)))
        self._caches = program(self._caches, tuple(rows), np.asarray(numbers, np.int32))

    def rehearse(self) -> bool:
        """Run the next of ``unrehearsed`` on rows that hold no sequence, and wait; False when none is left.

        A GPU loads and plans a program when it first runs, for up to half a second that no request should
        pay. It cannot do so while another program is being compiled.
        """
        if not self.unrehearsed or self.parked or self.programs.adapting:
            return False
        key = self.unrehearsed.pop(0)
        program, adapters = self.programs.get(key), key[0] == ADAPTED
        match plain(key):
            case ("decode", int(size)):
                rows = self._row_index([], size)
                self._caches, _ = program(self._taken(adapters), self._caches, self._batch, rows)
            case ("prefill", int(height), int(size), bool()):
                chunk = self._chunk([], height, size, adapters)
                self._caches, _ = program(self._taken(adapters), self._caches, chunk)
            case ("mixed", int(size), int(height)):
                index, chunk = self._row_index([], size), self._chunk([], height, PIECE, adapters)
                self._caches, *_ = program(self._taken(adapters), self._caches, self._batch, index, chunk)
            case ("sample", "greedy" | "plain" | "filtered", int(size)):
                logits = jax.device_put(np.zeros((size, self.limits.vocab_size), np.float32), self._common)
                self._batch, *_ = program(logits, self._row_index([], size), self._batch)
            case ("gather" | "scatter", int(size)) if size <= self.limits.pages:
                # What is written back is what is there.
                numbers = list(range(size))
                self.write_pages(numbers, self.read_pages(numbers))
            case (str(name), *_) if self.speculation is not None:
                self._rehearse_speculation(self.speculation, name, key, program)
        jax.block_until_ready((self._caches, self._batch))  # type: ignore[no-untyped-call]
        return True

    def rehearse_later(self, keys: list[Key]) -> None:
        """More programs to rehearse, on a device that needs it."""
        if self.programs.spec.place.device.platform != "cpu":
            self.unrehearsed += keys

    def _rehearse_speculation(self, speculation: Speculation, name: str, key: Key, program: Any) -> None:
        if name == "verify":
            _, size, guesses = plain(key)
            rows, weights = self._row_index([], int(size)), self._taken(key[0] == ADAPTED)
            held = (weights, self._caches, self._batch, speculation.history, rows)
            self._caches, *_ = speculation.verify(program, int(guesses), held)
        elif name == "accept" and "full" not in key:
            size, guesses = int(key[2]), int(key[3])
            logits = np.zeros((size, guesses + 1, self.limits.vocab_size), np.float32)
            logits, guess = jax.device_put((logits, no_guess(size, guesses)), self._common)
            rest = (self._row_index([], size), self._batch, speculation.history)
            self._batch, speculation.history, *_ = program(logits, guess, *rest)

    def place_adapter(self, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """The (A, B) of an adapter for each product, on this replica's device; on any thread."""
        placed: list[tuple[Any, Any]] = jax.device_put(pairs, self._common)
        return placed

    def adapt(self, number: int, pairs: list[tuple[Any, Any]]) -> None:
        """Put an adapter at its number: the steps dispatched from now on have it."""
        room = self.programs.spec.room
        assert room is not None
        stacks = [(self._weights[a], self._weights[b]) for a, b in room.places]
        program = self.programs.get(("adapt",))
        weights = list(self._weights)
        for (a, b), pair in zip(room.places, program(stacks, pairs, np.int32(number - 1)), strict=True):
            weights[a], weights[b] = pair
        self._keep(weights)

    def close(self) -> None:
        """Stop what still runs in the background, and leave pages behind that others can use."""
        self.programs.close()
        self._scrub()
        self._held.cleaners.remove(self._scrub)

    def reset(self) -> None:
        """Empty all slots; what is on the device is overwritten when a slot is taken again."""
        self.ledger = Ledger(self.limits, adapters=self.ledger.adapters)
        self._entering = []

    @property
    def weights(self) -> list[jax.Array]:
        """Those of the model, and of its draft model."""
        more = self.speculation.weights if self.speculation is not None else []
        return [*jax.tree.leaves(self._weights), *more]

    @property
    def state(self) -> list[jax.Array]:
        """What it has on its devices beside the weights, while nothing is in flight, but for a pool."""
        more = self.speculation.state if self.speculation is not None else []
        caches = self._held.caches if isinstance(self._held, Own) else []
        held = (caches, self._batch, self._tallies, list(self._rows.values()), more)
        return [x for x in jax.tree.leaves(held) if isinstance(x, jax.Array)]

    def put_down(self, weights: list[jax.Array]) -> None:
        """See ``parking.Parkable``."""
        self.reset()
        self.parked = True
        self._tallies = None
        if isinstance(self._held, Own):  # pages in a pool go to others, and are cleared for them
            self._held.caches, self._faulty = [], []
        self._tallied.clear()
        self._rows.clear()
        self._take_weights(weights)

    def renew(self) -> Any:
        """See ``parking.Parkable``."""
        assert self._make is not None
        held, batch = self._make()
        caches = held.caches if isinstance(held, Own) else []
        return caches, batch, self.speculation.renew() if self.speculation is not None else None

    def take_up(self, weights: list[jax.Array], state: Any) -> None:
        """See ``parking.Parkable``."""
        caches, self._batch, more = state
        if isinstance(self._held, Own):
            self._held.caches = caches
        self._take_weights(weights)
        if self.speculation is not None:
            self.speculation.take_up(more)
        self.parked = False

    def _take_weights(self, weights: list[jax.Array]) -> None:
        count = len(jax.tree.leaves(self._weights))
        self._keep(jax.tree.unflatten(jax.tree.structure(self._weights), weights[:count]))
        if self.speculation is not None:
            self.speculation.weights = weights[count:]

    def _keep(self, weights: Any) -> None:
        room = self.programs.spec.room
        self._weights, self._plain = weights, room.without(weights) if room is not None else weights

    def _taken(self, adapters: bool) -> Any:
        """The weights that forward programs take, those for rows with ``adapters`` or the plain ones."""
        return self._weights if adapters else self._plain

    def _steps(self, quantum: Quantum) -> Iterator[PendingStep]:
        chunks: dict[int, list[Chunk]] = {}
        for chunk in quantum.chunks:
            chunks.setdefault(chunk.step, []).append(chunk)
        last = max(chunks, default=-1)
        for index in range(quantum.steps):
            rows = self.ledger.ready(quantum.decode)
            if not rows and index > last:
                break
            begun = self._clock()
            calls = chunks.get(index, [])
            outputs = self._mixed(rows, calls) if rows and calls else []
            if not outputs:
                outputs = [self._decode(part) for part in self.programs.microbatches(rows)]
                outputs += self._prefill(calls)
            for _, packed, _ in outputs:
                packed.copy_to_host_async()
            self._admit()
            yield self._pending(quantum.id, index, outputs, begun, timed=index not in chunks)
        self._admit()

    def _decode(self, rows: list[int]) -> Output:
        if self.speculation is not None:
            return self._speculate(self.speculation, rows)
        adapters = self._adapted(rows)
        size, program = self.programs.decode(len(rows), adapters)
        index = self._row_index(rows, size)
        self._caches, logits = program(self._taken(adapters), self._caches, self._batch, index)
        for number in rows:
            self.ledger.advance(number)
        return self._sample(rows, index, logits)

    def _mixed(self, rows: list[int], calls: list[Chunk]) -> list[Output]:
        """Decode and prefill in one program, if there is one for so little; what either would return."""
        if self._adapted([*rows, *(call.slot for call in calls)]):
            return []
        parts = [part for call in calls for part in pieces(call, PIECE)]
        found = self.programs.mixed(len(rows), len(parts))
        if found is None:
            return []
        size, height, program = found
        index, chunk = self._row_index(rows, size), self._chunk(parts, height, PIECE, adapters=False)
        held = (self._taken(False), self._caches, self._batch, index, chunk)
        self._caches, logits, others = program(*held)
        for number in rows:
            self.ledger.advance(number)
        outputs = [self._sample(rows, index, logits)]
        complete = [part.slot if self.ledger.fill(part) else self.limits.slots for part in parts]
        return outputs + self._sample_complete(complete, height, others)

    def _speculate(self, speculation: Speculation, rows: list[int]) -> Output:
        slots = self.ledger.slots
        served = [(row, number, slots[number]) for row, number in enumerate(rows)]
        variant: Variant = max((slot.variant for *_, slot in served), key=VARIANTS.index)
        adapters = self._adapted(rows)
        size, guesses = speculation.choose(rows, variant, adapters)
        index = self._row_index(rows, size)
        verify, accept = speculation.programs(variant, size, guesses, adapters)
        held = (self._taken(adapters), self._caches, self._batch, speculation.history, index)
        self._caches, logits, guess = speculation.verify(verify, guesses, held)
        tallies = (self._tallies,) if variant == "full" else ()
        results = accept(logits, guess, index, self._batch, speculation.history, *tallies)
        self._batch, speculation.history, counted, packed = results
        self._tallies = counted if tallies else self._tallies
        for number in rows:
            self.ledger.advance(number)
        return served, packed, guesses

    def _prefill(self, chunks: list[Chunk]) -> list[Output]:
        """Prefill the chunks of a step, those of like length together; sample where a prompt is complete."""
        outputs = []
        sizes = self.programs.spec.chunk_sizes
        for size, fresh, calls in group(chunks, sizes):
            for at in range(0, len(calls), self.programs.rows_for(size)[-1]):
                part = calls[at : at + self.programs.rows_for(size)[-1]]
                outputs += self._prefill_rows(part, size, fresh)
        return outputs

    def _prefill_rows(self, calls: list[Chunk], size: int, fresh: bool) -> list[Output]:
        adapters = self._adapted([call.slot for call in calls])
        height, program = self.programs.prefill(len(calls), size, fresh, adapters)
        chunk = self._chunk(calls, height, size, adapters)
        self._caches, logits = program(self._taken(adapters), self._caches, chunk)
        complete = [call.slot if self.ledger.fill(call) else self.limits.slots for call in calls]
        return self._sample_complete(complete, height, logits)

    def _sample_complete(self, slots: list[int], height: int, logits: jax.Array) -> list[Output]:
        """The first tokens after prompts: of a row that completes none, the slot is the spare one."""
        if all(slot == self.limits.slots for slot in slots):
            return []
        return [self._sample(slots, self._row_index(slots, height), logits)]

    def _adapted(self, slots: list[int]) -> bool:
        """Whether a sequence in these slots has an adapter."""
        return any(self.ledger.slots[slot].adapter for slot in slots)

    def _chunk(self, calls: list[Chunk], height: int, size: int, adapters: bool) -> np.ndarray:
        """What ``forward.prefill`` takes: [height, heading + width + size], padded with empty rows."""
        table, width = heading(adapters), self._batch.tables.shape[1]
        tokens = table + width
        chunk = np.zeros((height, tokens + size), np.int32)
        chunk[:, table:tokens] = self.limits.pages
        for row, call in enumerate(calls):
            slot = self.ledger.slots[call.slot]
            chunk[row, :2] = call.start, call.length
            if adapters:
                chunk[row, 2] = slot.adapter
            chunk[row, table : table + slot.held] = slot.table
            part = slot.tokens[call.start : call.start + call.length]
            chunk[row, tokens : tokens + call.length] = part
        return chunk

    def _sample(self, rows: list[int], index: jax.Array, logits: jax.Array) -> Output:
        self._admit()
        slots = self.ledger.slots
        served = [(row, number, slots[number]) for row, number in enumerate(rows) if number in slots]
        variant: Variant = max((slot.variant for *_, slot in served), key=VARIANTS.index)
        program = self.programs.get(("sample", variant, index.shape[0]))
        if variant == "full":
            self._batch, self._tallies, packed = program(logits, index, self._batch, self._tallies)
        else:
            self._batch, _, packed = program(logits, index, self._batch)
        return served, packed, -1

    def _pending(
        self, quantum: int, index: int, outputs: list[Output], begun: float, timed: bool
    ) -> PendingStep:
        def resolve() -> Step:
            results = [(served, np.asarray(packed), guesses) for served, packed, guesses in outputs]
            now = self._clock()
            since, self._completed = max(begun, self._completed), now
            slots: list[int] = []
            tokens: list[int] = []
            finished: list[tuple[int, FinishReason]] = []
            for served, packed, guesses in results:
                if guesses >= 0:
                    self._resolved(served, packed, guesses, now - since if timed else 0.0)
                    packed = packed[:-2]
                self._collect(served, packed, slots, tokens, finished)
            return Step(quantum, index, slots, tokens, finished, round((now - since) * 1e6))

        arrays: list[Any] = [packed for _, packed, _ in outputs]
        ready = lambda: all(array.is_ready() for array in arrays)  # noqa: E731
        return Pending(resolve, ready, overlaps=self.programs.spec.place.stages > 1)

    def _resolved(self, served: Served, packed: np.ndarray, guesses: int, seconds: float) -> None:
        """Learn from a step that may have verified guesses how many tokens each slot really gained."""
        gained = (packed[:-3] >= 0).sum(axis=0).tolist()
        trials, hits = packed[-2:].tolist()
        present = self.ledger.slots
        for row, number, slot in served:
            slot.length += gained[row] - 1
            if self.speculation is not None and present.get(number) is slot:
                self.speculation.observe(number, guesses, trials[row], hits[row])
        if self.speculation is not None and seconds:
            self.speculation.resolved(len(served), packed.shape[1], guesses, sum(gained), seconds)

    def _collect(
        self,
        served: Served,
        packed: np.ndarray,
        slots: list[int],
        tokens: list[int],
        finished: list[tuple[int, FinishReason]],
    ) -> None:
        *columns, codes = packed.tolist()
        for row, number, slot in served:
            made = [column[row] for column in columns if column[row] >= 0]
            slots += [number] * len(made)
            tokens += made
            if code := codes[row]:
                finished.append((number, REASONS[code]))
                slot.finished = True
            if code and REASONS[code] == "error":
                self._faulty += slot.table

    def _row_index(self, rows: list[int], size: int) -> jax.Array:
        """Slot numbers padded with the spare row, kept on the device while the batch stays the same."""
        padded = (*rows, *[self.limits.slots] * (size - len(rows)))
        if padded not in self._rows:
            if len(self._rows) >= 4 * self.limits.slots + 16:
                self._rows.clear()
            self._rows[padded] = self.programs.place_rows(np.asarray(padded, np.int32))
        return self._rows[padded]

    def _admit(self) -> None:
        starts, self._entering = self._entering, []
        program = self.programs.get(("admit",))
        for first in range(0, len(starts), ADMIT_ROWS):
            self._batch = program(self._batch, *self._admission(starts[first : first + ADMIT_ROWS]))
        if self.speculation is not None:
            self.speculation.begin(starts)
        for start in starts:
            penalised = self.ledger.slots[start.slot].variant == "full"
            if penalised or start.slot in self._tallied:
                self._tally(start)
            (self._tallied.add if penalised else self._tallied.discard)(start.slot)

    def _admission(self, starts: list[Start]) -> tuple[Any, Any]:
        width, spare = self._batch.tables.shape[1], self.limits.pages
        tables = [start.pages + [spare] * (width - len(start.pages)) for start in starts]
        tables += [[spare] * width] * (ADMIT_ROWS - len(starts))
        adapters = [self.ledger.slots[start.slot].adapter for start in starts]
        own = adapters if self.programs.spec.room else None
        packed: tuple[Any, Any] = pack_admission(starts, ADMIT_ROWS, self.limits.slots, tables, own)
        return packed

    def _tally(self, start: Start) -> None:
        if self._tallies is None:
            empty = empty_tallies(self.limits.slots, self.limits.vocab_size)
            self._tallies = jax.device_put(empty, self._common)
        tokens = np.zeros(self.limits.max_context, np.int32)
        tokens[: len(start.tokens)] = start.tokens
        ids = np.full(BIAS_LIMIT, self.limits.vocab_size, np.int32)
        values = np.zeros(BIAS_LIMIT, np.float32)
        ids[: len(start.sampling.logit_bias)] = list(start.sampling.logit_bias)
        values[: len(start.sampling.logit_bias)] = list(start.sampling.logit_bias.values())
        counts = (np.int32(start.prompt), np.int32(len(start.tokens)))
        program = self.programs.get(("tally",))
        self._tallies = program(self._tallies, np.int32(start.slot), tokens, *counts, ids, values)

    def _grow(self, quantum: Quantum) -> None:
        cells: list[tuple[int, int, int]] = []
        held = {growth.slot: self.ledger.slots[growth.slot].held for growth in quantum.grow}
        for growth in reversed(quantum.grow):
            held[growth.slot] -= len(growth.pages)
            first = held[growth.slot]
            cells += [(growth.slot, first + i, page) for i, page in enumerate(growth.pages)]
        program = self.programs.get(("grow",))
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
            program = self.programs.get(("scrub",))
            self._caches = program(self._caches, np.asarray(part, np.int32))

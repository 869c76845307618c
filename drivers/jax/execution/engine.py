"""One loaded model: the life of a quantum, from the check of what it asks to the dispatch of its last step.

Nothing here waits for the device: programs are dispatched, and the tokens of a step are fetched by the
``PendingStep`` that the step yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from llmos.drivers.jax.execution import packing
from llmos.drivers.jax.execution.admission import admit, grow
from llmos.drivers.jax.execution.buckets import group, pieces
from llmos.drivers.jax.execution.rehearsal import rehearse
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.execution.results import Output, Results, Served
from llmos.drivers.jax.execution.spec import PIECE, Key
from llmos.drivers.jax.sampling.sampling import VARIANTS, Variant
from llmos.drivers.jax.speculation.speculating import Speculation
from llmos.drivers.sdk.driver import PendingStep
from llmos.drivers.sdk.messages import Chunk, Quantum


class Engine:
    """Executes quanta on one replica of a model; see ``Driver.execute`` for the contract.

    The replica has what programs take and give back; ``clock`` tells seconds.
    """

    def __init__(self, replica: Replica, clock: Callable[[], float] = time.perf_counter) -> None:
        self.replica = replica
        self.limits = replica.limits
        self.ledger = replica.ledger
        self.programs = replica.programs
        self.speculation = replica.speculation
        self.unrehearsed: list[Key] = []
        self._clock = clock
        self._results = Results(replica, clock)

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        """Check a quantum and apply its release, start and grow now; the iterator dispatches its steps.

        Starts reach the device behind the first prompts, which need nothing of the batch and are waited for.
        """
        self.ledger.check(quantum)
        self.replica.clean()
        self.ledger.enter(quantum)
        self.replica.entering = quantum.start
        if quantum.grow:
            admit(self.replica)
            grow(self.replica, quantum.grow)
        return self._steps(quantum)

    def rehearse(self) -> bool:
        """Run the next of ``unrehearsed`` on rows that hold no sequence, and wait; False when none is left.

        A GPU loads and plans a program when it first runs, for up to half a second that no request should
        pay. It cannot do so while another program is being compiled.
        """
        if not self.unrehearsed or self.replica.parked or self.programs.adapting:
            return False
        rehearse(self.replica, self.unrehearsed.pop(0))
        return True

    def rehearse_later(self, keys: list[Key]) -> None:
        """More programs to rehearse, on a device that needs it."""
        if self.programs.spec.place.device.platform != "cpu":
            self.unrehearsed += keys

    def close(self) -> None:
        """Stop what still runs in the background, and leave pages behind that others can use."""
        self.programs.close()
        self.replica.close()

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
            outputs = self._dispatch(rows, chunks.get(index, []))
            for output in outputs:
                output.packed.copy_to_host_async()
            admit(self.replica)
            yield self._results.pending(quantum.id, index, outputs, begun, timed=index not in chunks)
        admit(self.replica)

    def _dispatch(self, rows: list[int], calls: list[Chunk]) -> list[Output]:
        """One step: the slots ``rows`` decode, and the prompts of ``calls`` are prefilled."""
        outputs = self._mixed(rows, calls) if rows and calls else []
        if not outputs:
            outputs = [self._decode(part) for part in self.programs.microbatches(rows)]
            outputs += self._prefill(calls)
        return outputs

    def _decode(self, rows: list[int]) -> Output:
        if self.speculation is not None:
            return self._speculate(self.speculation, rows)
        held, adapters = self.replica, self._adapted(rows)
        size, program = self.programs.decode(len(rows), adapters)
        index = held.row_index(rows, size)
        held.caches, logits = program(held.weights_for(adapters), held.caches, held.batch, index)
        self._advance(rows)
        return self._sample(rows, index, logits)

    def _mixed(self, rows: list[int], calls: list[Chunk]) -> list[Output]:
        """Decode and prefill in one program, if there is one for so little; what either would return."""
        if self._adapted([*rows, *(call.slot for call in calls)]):
            return []
        parts = [part for call in calls for part in pieces(call, PIECE)]
        found = self.programs.mixed(len(rows), len(parts))
        if found is None:
            return []
        held, (size, height, program) = self.replica, found
        index, chunk = held.row_index(rows, size), self._chunk(parts, height, PIECE, adapters=False)
        taken = (held.weights_for(False), held.caches, held.batch, index, chunk)
        held.caches, logits, others = program(*taken)
        self._advance(rows)
        return [self._sample(rows, index, logits), *self._sample_complete(parts, height, others)]

    def _speculate(self, speculation: Speculation, rows: list[int]) -> Output:
        held, adapters = self.replica, self._adapted(rows)
        served, variant = self._served(rows)
        size, guesses = speculation.choose(rows, variant, adapters)
        index = held.row_index(rows, size)
        verify, accept = speculation.programs(variant, size, guesses, adapters)
        taken = (held.weights_for(adapters), held.caches, held.batch, speculation.history, index)
        held.caches, logits, guess = speculation.verify(verify, guesses, taken)
        tallies = (held.tallies,) if variant == "full" else ()
        results = accept(logits, guess, index, held.batch, speculation.history, *tallies)
        held.batch, speculation.history, counted, packed = results
        held.tallies = counted if tallies else held.tallies
        self._advance(rows)
        return Output(served, packed, guesses)

    def _prefill(self, chunks: list[Chunk]) -> list[Output]:
        """Prefill the chunks of a step, those of like length together; sample where a prompt is complete."""
        outputs = []
        for size, fresh, calls in group(chunks, self.programs.spec.chunk_sizes):
            most = self.programs.spec.rows_for(size)[-1]
            for at in range(0, len(calls), most):
                outputs += self._prefill_rows(calls[at : at + most], size, fresh)
        return outputs

    def _prefill_rows(self, calls: list[Chunk], size: int, fresh: bool) -> list[Output]:
        held, adapters = self.replica, self._adapted([call.slot for call in calls])
        height, program = self.programs.prefill(len(calls), size, fresh, adapters)
        chunk = self._chunk(calls, height, size, adapters)
        held.caches, logits = program(held.weights_for(adapters), held.caches, chunk)
        return self._sample_complete(calls, height, logits)

    def _sample_complete(self, calls: list[Chunk], height: int, logits: jax.Array) -> list[Output]:
        """Count the chunks; the first tokens after prompts: of a row that completes none, the slot is the
        spare one."""
        slots = [call.slot if self.ledger.fill(call) else self.limits.slots for call in calls]
        if all(slot == self.limits.slots for slot in slots):
            return []
        return [self._sample(slots, self.replica.row_index(slots, height), logits)]

    def _sample(self, rows: list[int], index: jax.Array, logits: jax.Array) -> Output:
        admit(self.replica)
        held = self.replica
        served, variant = self._served(rows)
        program = self.programs.get(("sample", variant, index.shape[0]))
        if variant == "full":
            held.batch, held.tallies, packed = program(logits, index, held.batch, held.tallies)
        else:
            held.batch, _, packed = program(logits, index, held.batch)
        return Output(served, packed)

    def _advance(self, rows: list[int]) -> None:
        for number in rows:
            self.ledger.advance(number)

    def _served(self, rows: list[int]) -> tuple[Served, Variant]:
        """Whose slots these are, but for the spare one, and the variant of sampling that does for all."""
        slots = self.ledger.slots
        served = [(row, number, slots[number]) for row, number in enumerate(rows) if number in slots]
        return served, max((slot.variant for *_, slot in served), key=VARIANTS.index)

    def _adapted(self, slots: list[int]) -> bool:
        """Whether a sequence in these slots has an adapter."""
        return any(self.ledger.slots[slot].adapter for slot in slots)

    def _chunk(self, calls: list[Chunk], height: int, size: int, adapters: bool) -> np.ndarray:
        shape = (height, self.replica.width, size)
        return packing.chunk(calls, self.ledger.slots, self.limits, shape, adapters)

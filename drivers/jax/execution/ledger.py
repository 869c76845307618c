"""What the host knows of every slot, kept without asking the device; all validation happens here.

The ledger follows what was *dispatched*. It cannot see a stop token before its step is resolved, so the
length of a slot is an upper bound until then; where ``finished`` is set the device has said so. With
speculation (``overtaking``) a dispatched step counts as one token until it is resolved, and a slot that has
no page for its next token holds still, where else the quantum would be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmos.drivers.jax.sampling.sampling import Variant, variant_of
from llmos.drivers.sdk.checks import STOP_LIMIT, check_sampling
from llmos.drivers.sdk.messages import Chunk, Quantum, Start
from llmos.ipc.errors import InvalidArgument

MAX_STEPS = 1024


@dataclass(frozen=True)
class Limits:
    """Sizes of a loaded model that quanta are checked against."""

    slots: int
    pages: int
    page_tokens: int
    max_context: int
    chunk_tokens: int
    vocab_size: int
    overtaking: bool = False
    """Whether a slot may gain several tokens in a step, so that whoever plans its pages can be behind."""


@dataclass
class Slot:
    """A sequence: ``filled`` of its known ``tokens`` have KV; ``length`` counts those produced as well.

    ``held`` counts its pages; their ids in ``table`` are not carried into trial copies. ``adapter`` is the
    number of its adapter, 0 for none.
    """

    tokens: list[int]
    prompt: int
    limit: int
    variant: Variant
    filled: int
    length: int
    held: int = 0
    table: list[int] = field(default_factory=list)
    finished: bool = False
    adapter: int = 0

    @property
    def ready(self) -> bool:
        """Whether the next decode step produces a token, as far as the host knows."""
        return self.filled == len(self.tokens) < self.length < self.limit and not self.finished


@dataclass
class Ledger:
    """The occupied slots of one model's batch; ``adapters`` are the numbers of those that are loaded."""

    limits: Limits
    slots: dict[int, Slot] = field(default_factory=dict)
    adapters: Mapping[str, int] = field(default_factory=dict)

    def check(self, quantum: Quantum) -> None:
        """Refuse with InvalidArgument whatever in ``quantum`` could not be executed; changes nothing."""
        if not 0 <= quantum.steps <= MAX_STEPS:
            raise InvalidArgument(f"a quantum has at most {MAX_STEPS} steps, not {quantum.steps}")
        copies = {number: replace(slot, table=[]) for number, slot in self.slots.items()}
        trial = Ledger(self.limits, copies, self.adapters)
        trial.enter(quantum)
        chunks = _by_step(quantum)
        if len(set(quantum.decode)) != len(quantum.decode):
            raise InvalidArgument("a slot is listed twice in decode")
        for number in quantum.decode:
            trial.occupied(number)
        for step in range(quantum.steps):
            if sum(chunk.length for chunk in chunks.get(step, [])) > self.limits.chunk_tokens:
                raise InvalidArgument(f"the chunks of step {step} exceed {self.limits.chunk_tokens} tokens")
            for number in trial.ready(quantum.decode):
                trial.advance(number)
            for chunk in chunks.get(step, []):
                trial.fill(chunk)

    def enter(self, quantum: Quantum) -> None:
        """Apply what a quantum changes before its first step: release, start, grow."""
        for number in quantum.release:
            self.occupied(number)
            del self.slots[number]
        for start in quantum.start:
            self._start(start)
        for growth in quantum.grow:
            self._extend(self.occupied(growth.slot), growth.slot, growth.pages)

    def occupied(self, number: int) -> Slot:
        """The sequence in a slot."""
        slot = self.slots.get(number)
        if slot is None:
            raise InvalidArgument(f"slot {number} holds no sequence; start one first")
        return slot

    def ready(self, decode: list[int]) -> list[int]:
        """The slots among ``decode`` that produce a token in the next step."""
        return [number for number in decode if self.slots[number].ready and not self._stalled(number)]

    def _stalled(self, number: int) -> bool:
        slot = self.slots[number]
        return self.limits.overtaking and slot.length > slot.held * self.limits.page_tokens

    def advance(self, number: int) -> None:
        """Count one decode step of a slot; it writes KV at the position of the slot's last token."""
        slot = self.slots[number]
        self._covered(number, slot, slot.length)
        slot.length += 1

    def fill(self, chunk: Chunk) -> bool:
        """Count a prefill chunk; true when it completes the known tokens, so that a token is sampled."""
        slot = self.occupied(chunk.slot)
        if chunk.start != slot.filled or chunk.length < 1:
            raise InvalidArgument(
                f"the next chunk of slot {chunk.slot} starts at {slot.filled}, "
                f"not {chunk.start} with length {chunk.length}"
            )
        if chunk.start + chunk.length > len(slot.tokens):
            raise InvalidArgument(f"a chunk of slot {chunk.slot} passes its {len(slot.tokens)} known tokens")
        self._covered(chunk.slot, slot, chunk.start + chunk.length)
        slot.filled += chunk.length
        if slot.filled < len(slot.tokens):
            return False
        slot.length += 1
        return True

    def _covered(self, number: int, slot: Slot, tokens: int) -> None:
        held = slot.held * self.limits.page_tokens
        if tokens > held:
            raise InvalidArgument(f"slot {number} has pages for {held} tokens and needs {tokens}; grow it")

    def _start(self, start: Start) -> None:
        limits, known = self.limits, len(start.tokens)
        where = f"the sequence for slot {start.slot}"
        if not 0 <= start.slot < limits.slots:
            raise InvalidArgument(f"slot {start.slot} is not in 0..{limits.slots - 1}")
        if start.slot in self.slots:
            raise InvalidArgument(f"slot {start.slot} is occupied; release it first")
        if not 1 <= start.prompt <= known or not 0 <= start.cached < known:
            raise InvalidArgument(
                f"{where} has {known} tokens with prompt {start.prompt} and cached {start.cached}"
            )
        if not known < start.limit <= limits.max_context:
            raise InvalidArgument(f"{where}: limit {start.limit} is not in {known + 1}..{limits.max_context}")
        if min(start.tokens) < 0 or max(start.tokens) >= limits.vocab_size:
            raise InvalidArgument(f"{where} has a token outside 0..{limits.vocab_size - 1}")
        if len(start.stop) > STOP_LIMIT or any(not 0 <= token < limits.vocab_size for token in start.stop):
            raise InvalidArgument(f"{where}: at most {STOP_LIMIT} stop tokens, all in the vocabulary")
        check_sampling(start.sampling, limits.vocab_size)
        if start.adapter and start.adapter not in self.adapters:
            raise InvalidArgument(f"{where}: adapter {start.adapter} is not loaded")
        slot = Slot(
            tokens=start.tokens,
            prompt=start.prompt,
            limit=start.limit,
            variant=variant_of(start.sampling),
            filled=start.cached,
            length=known,
            adapter=self.adapters.get(start.adapter, 0),
        )
        self._extend(slot, start.slot, start.pages)
        self._covered(start.slot, slot, start.cached)
        self.slots[start.slot] = slot

    def _extend(self, slot: Slot, number: int, pages: list[int]) -> None:
        for page in pages:
            if not 0 <= page < self.limits.pages:
                raise InvalidArgument(f"page {page} of slot {number} is not in 0..{self.limits.pages - 1}")
        slot.table.extend(pages)
        slot.held += len(pages)
        if (slot.held - 1) * self.limits.page_tokens >= self.limits.max_context:
            raise InvalidArgument(f"slot {number} has more pages than {self.limits.max_context} tokens need")


def _by_step(quantum: Quantum) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    for chunk in quantum.chunks:
        if not 0 <= chunk.step < quantum.steps:
            raise InvalidArgument(f"a chunk names step {chunk.step} of {quantum.steps}")
        chunks.setdefault(chunk.step, []).append(chunk)
    return chunks

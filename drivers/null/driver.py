"""The null driver: what it generates depends on a sequence's tokens alone, never on batch or placement."""

from __future__ import annotations

import time
from collections.abc import Iterator

from llmos.drivers.sdk.driver import Driver, Pending, PendingStep, Progress
from llmos.drivers.sdk.messages import (
    Device,
    DriverInfo,
    FinishReason,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Quantum,
    Start,
    Step,
)
from llmos.ipc.errors import InvalidArgument, NotFound

VOCABULARY = 256
DEFAULT_PAGES = 4096


def next_token(tokens: list[int]) -> int:
    """The token that follows a sequence: a fixed function of its last token and its length."""
    return (tokens[-1] * 31 + len(tokens) * 7 + 11) % VOCABULARY


class _Sequence:
    def __init__(self, start: Start) -> None:
        self.start = start
        self.tokens = list(start.tokens)
        self.computed = start.cached
        self.capacity = len(start.pages)
        self.finished = False


class NullDriver(Driver):
    """Takes ``step_ms`` milliseconds a step, and ``prefill_us`` microseconds for each prompt token in it.

    Of a mesh only the data axis counts: each replica has its own time.
    """

    def __init__(self, step_ms: float = 0.0, prefill_us: float = 0.0, decode_us: float = 0.0) -> None:
        self._step = step_ms / 1e3
        self._prefill = prefill_us / 1e6
        self._decode = decode_us / 1e6
        self._models: dict[str, LoadedModel] = {}
        self._slots: dict[tuple[str, int], dict[int, _Sequence]] = {}
        self._free_at: dict[int, float] = {}

    def describe(self) -> DriverInfo:
        return DriverInfo("null", "1", [Device(0, "other", "null")], ["float32"])

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        progress(LoadProgress("read", 1, 1))
        loaded = LoadedModel(
            model=request.model,
            family="null",
            parameters=0,
            weight_bytes=0,
            pages=request.pages or DEFAULT_PAGES,
            page_tokens=request.page_tokens,
            page_bytes=request.page_tokens,
            slots=request.slots,
            max_context=request.max_context,
            chunk_tokens=request.chunk_tokens,
            vocab_size=VOCABULARY,
            stop_tokens=[],
            attention="none",
            replicas=request.mesh.get("data", 1),
        )
        self._models[request.model] = loaded
        self.reset(request.model)
        return loaded

    def reset(self, model: str, replica: int = -1) -> None:
        if model not in self._models:
            raise NotFound(f"no model {model!r} is loaded here")
        for number in range(self._models[model].replicas) if replica < 0 else [replica]:
            self._slots[model, number] = {}

    def unload(self, model: str) -> None:
        loaded = self._models.pop(model, None)
        if loaded is None:
            raise NotFound(f"no model {model!r} is loaded here")
        for number in range(loaded.replicas):
            del self._slots[model, number]

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        model = self._models.get(quantum.model)
        if model is None:
            raise NotFound(f"no model {quantum.model!r} is loaded here")
        if not 0 <= quantum.replica < model.replicas:
            raise InvalidArgument(f"model {quantum.model!r} has no replica {quantum.replica}")
        slots = self._slots[quantum.model, quantum.replica]
        _check(quantum, slots, model)
        for slot in quantum.release:
            del slots[slot]
        for start in quantum.start:
            slots[start.slot] = _Sequence(start)
        for growth in quantum.grow:
            slots[growth.slot].capacity += len(growth.pages)
        return self._steps(quantum, slots, model)

    def _steps(
        self, quantum: Quantum, slots: dict[int, _Sequence], model: LoadedModel
    ) -> Iterator[PendingStep]:
        for index in range(quantum.steps):
            ready = [s for s in quantum.decode if not slots[s].finished and _decodes(slots[s])]
            prefilled = 0
            for chunk in quantum.chunks:
                if chunk.step == index:
                    sequence = slots[chunk.slot]
                    if chunk.start != sequence.computed:
                        raise InvalidArgument(
                            f"slot {chunk.slot}: chunk at {chunk.start}, not at {sequence.computed}"
                        )
                    sequence.computed += chunk.length
                    prefilled += chunk.length
                    if sequence.computed == len(sequence.tokens):
                        ready.append(chunk.slot)
            if not ready and not prefilled:
                return
            yield self._produce(quantum, index, slots, ready, prefilled, model.page_tokens)

    def _produce(
        self,
        quantum: Quantum,
        index: int,
        slots: dict[int, _Sequence],
        ready: list[int],
        prefilled: int,
        page_tokens: int,
    ) -> PendingStep:
        tokens: list[int] = []
        finished: list[tuple[int, FinishReason]] = []
        for slot in ready:
            sequence = slots[slot]
            if len(sequence.tokens) > sequence.capacity * page_tokens:
                raise InvalidArgument(
                    f"slot {slot}: {len(sequence.tokens)} tokens exceed its {sequence.capacity} pages"
                )
            token = next_token(sequence.tokens)
            sequence.computed = len(sequence.tokens)
            sequence.tokens.append(token)
            tokens.append(token)
            if token in sequence.start.stop:
                finished.append((slot, "stop"))
            elif len(sequence.tokens) >= sequence.start.limit:
                finished.append((slot, "length"))
        for slot, _ in finished:
            slots[slot].finished = True
        cost = self._step + self._prefill * prefilled + self._decode * len(ready)
        began = max(time.monotonic(), self._free_at.get(quantum.replica, 0.0))
        self._free_at[quantum.replica] = ends = began + cost
        step = Step(quantum.id, index, ready, tokens, finished, round(cost * 1e6))

        def wait() -> Step:
            if (left := ends - time.monotonic()) > 0:
                time.sleep(left)
            return step

        return Pending(wait, lambda: time.monotonic() >= ends)


def _decodes(sequence: _Sequence) -> bool:
    return sequence.computed >= len(sequence.tokens) - 1 and len(sequence.tokens) > len(sequence.start.tokens)


def _check(quantum: Quantum, slots: dict[int, _Sequence], model: LoadedModel) -> None:
    """Refuse a quantum that names a slot or page that is not there, before any effect."""
    occupied = set(slots) - set(quantum.release)
    if unknown := set(quantum.release) - set(slots):
        raise InvalidArgument(f"slots {sorted(unknown)} are empty already")
    for start in quantum.start:
        if start.slot in occupied or not 0 <= start.slot < model.slots:
            raise InvalidArgument(f"slot {start.slot} is taken, or not below {model.slots}")
        if not 0 <= start.cached < len(start.tokens):
            raise InvalidArgument(f"slot {start.slot}: {start.cached} of {len(start.tokens)} tokens cached")
        occupied.add(start.slot)
    named = {g.slot for g in quantum.grow} | {c.slot for c in quantum.chunks} | set(quantum.decode)
    if named - occupied:
        raise InvalidArgument(f"slots {sorted(named - occupied)} are empty")
    pages = [p for s in quantum.start for p in s.pages] + [p for g in quantum.grow for p in g.pages]
    if any(not 0 <= page < model.pages for page in pages):
        raise InvalidArgument(f"a page is not below {model.pages}")

"""The null driver: what it generates depends on a sequence's tokens alone, never on batch or placement.

Its KV cache holds the tokens that it was computed from, so a sequence that is started on pages that are not
its own, or were moved wrongly, is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from llmos.drivers.null.pages import Pages, page_size
from llmos.drivers.sdk.driver import Driver, Finish, PendingMove, PendingStep, Progress
from llmos.drivers.sdk.messages import (
    Device,
    DriverInfo,
    FinishReason,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Move,
    Moved,
    Quantum,
    Start,
    Step,
)
from llmos.drivers.sdk.sizes import with_tiers
from llmos.drivers.sdk.tiers import Tiers
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
        self.table = list(start.pages)
        self.finished = False


class _Cache:
    """The pages of one model, on the device and beside it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.device = Pages(loaded.pages, loaded.page_tokens)
        self.tiers = Tiers(loaded.model, loaded.page_bytes, loaded.host_pages, loaded.disk_pages)


class NullDriver(Driver):
    """Takes ``step_ms`` milliseconds a step, ``prefill_us`` microseconds for each prompt token in it,
    ``decode_us`` for each sequence that decodes, and ``move_us`` for each page that is moved."""

    def __init__(
        self, step_ms: float = 0.0, prefill_us: float = 0.0, decode_us: float = 0.0, move_us: float = 0.0
    ) -> None:
        self._step = step_ms / 1e3
        self._prefill = prefill_us / 1e6
        self._decode = decode_us / 1e6
        self._move = move_us / 1e6
        self._models: dict[str, LoadedModel] = {}
        self._caches: dict[str, _Cache] = {}
        self._slots: dict[str, dict[int, _Sequence]] = {}
        self._free_at = 0.0

    def describe(self) -> DriverInfo:
        return DriverInfo("null", "1", [Device(0, "other", "null")], ["float32"])

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        progress(LoadProgress("read", 1, 1))
        request = with_tiers(request, page_size(request.page_tokens), device_is_ram=True)
        loaded = LoadedModel(
            model=request.model,
            family="null",
            parameters=0,
            weight_bytes=0,
            pages=request.pages or DEFAULT_PAGES,
            page_tokens=request.page_tokens,
            page_bytes=page_size(request.page_tokens),
            slots=request.slots,
            max_context=request.max_context,
            chunk_tokens=request.chunk_tokens,
            vocab_size=VOCABULARY,
            stop_tokens=[],
            attention="none",
            host_pages=request.host_pages,
            disk_pages=request.disk_pages,
        )
        self._models[request.model] = loaded
        self._caches[request.model] = _Cache(loaded)
        self._slots[request.model] = {}
        return loaded

    def reset(self, model: str) -> None:
        if model not in self._models:
            raise NotFound(f"no model {model!r} is loaded here")
        self._slots[model] = {}

    def unload(self, model: str) -> None:
        if self._models.pop(model, None) is None:
            raise NotFound(f"no model {model!r} is loaded here")
        del self._slots[model]
        self._caches.pop(model).tiers.close()

    def move(self, move: Move, key: bytes) -> PendingMove:
        cache, began = self._caches[move.model], time.monotonic()
        if "device" not in (move.source, move.target):
            return cache.tiers.move(move, key)
        pages = [bytes(cache.device[page]) for page, _ in move.pages] if move.source == "device" else []

        def copy() -> Finish:
            if move.source == "device":
                for (_, block), page in zip(move.pages, pages, strict=True):
                    cache.tiers.put(move.target, block, page, key)
            else:
                pages[:] = [bytes(cache.tiers.get(move.source, block, key)) for block, _ in move.pages]
            if self._move:
                time.sleep(self._move * len(move.pages))
            return finish

        def finish() -> Moved:
            if move.target == "device":
                for (_, page), block in zip(move.pages, pages, strict=True):
                    cache.device[page][:] = block
            micros = round((time.monotonic() - began) * 1e6)
            return Moved(len(move.pages) * cache.device.size, micros)

        return copy

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        model = self._models.get(quantum.model)
        if model is None:
            raise NotFound(f"no model {quantum.model!r} is loaded here")
        slots, cache = self._slots[quantum.model], self._caches[quantum.model]
        _check(quantum, slots, model)
        for start in quantum.start:
            cache.device.check(start.pages, start.tokens[: start.cached])
        for slot in quantum.release:
            del slots[slot]
        for start in quantum.start:
            slots[start.slot] = _Sequence(start)
        for growth in quantum.grow:
            slots[growth.slot].table += growth.pages
        return self._steps(quantum, slots, cache.device)

    def _steps(self, quantum: Quantum, slots: dict[int, _Sequence], pages: Pages) -> Iterator[PendingStep]:
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
                    _compute(chunk.slot, sequence, chunk.start + chunk.length, pages)
                    prefilled += chunk.length
                    if sequence.computed == len(sequence.tokens):
                        ready.append(chunk.slot)
            if not ready and not prefilled:
                return
            yield self._produce(quantum, index, slots, ready, prefilled, pages)

    def _produce(
        self,
        quantum: Quantum,
        index: int,
        slots: dict[int, _Sequence],
        ready: list[int],
        prefilled: int,
        pages: Pages,
    ) -> PendingStep:
        tokens: list[int] = []
        finished: list[tuple[int, FinishReason]] = []
        for slot in ready:
            sequence = slots[slot]
            _compute(slot, sequence, len(sequence.tokens), pages)
            token = next_token(sequence.tokens)
            sequence.tokens.append(token)
            tokens.append(token)
            if token in sequence.start.stop:
                finished.append((slot, "stop"))
            elif len(sequence.tokens) >= sequence.start.limit:
                finished.append((slot, "length"))
        for slot, _ in finished:
            slots[slot].finished = True
        cost = self._step + self._prefill * prefilled + self._decode * len(ready)
        began = max(time.monotonic(), self._free_at)
        self._free_at = ends = began + cost
        step = Step(quantum.id, index, ready, tokens, finished, round(cost * 1e6))

        def wait() -> Step:
            if (left := ends - time.monotonic()) > 0:
                time.sleep(left)
            return step

        return wait


def _decodes(sequence: _Sequence) -> bool:
    return sequence.computed >= len(sequence.tokens) - 1 and len(sequence.tokens) > len(sequence.start.tokens)


def _compute(slot: int, sequence: _Sequence, stop: int, pages: Pages) -> None:
    """Bring the KV of a sequence to its first ``stop`` tokens."""
    if stop > len(sequence.table) * pages.page_tokens:
        raise InvalidArgument(f"slot {slot}: {stop} tokens exceed its {len(sequence.table)} pages")
    pages.write(sequence.table, sequence.tokens, sequence.computed, stop)
    sequence.computed = stop


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
        if start.cached > len(start.pages) * model.page_tokens:
            raise InvalidArgument(f"slot {start.slot}: {start.cached} tokens exceed its pages")
        occupied.add(start.slot)
    named = {g.slot for g in quantum.grow} | {c.slot for c in quantum.chunks} | set(quantum.decode)
    if named - occupied:
        raise InvalidArgument(f"slots {sorted(named - occupied)} are empty")
    pages = [p for s in quantum.start for p in s.pages] + [p for g in quantum.grow for p in g.pages]
    if any(not 0 <= page < model.pages for page in pages):
        raise InvalidArgument(f"a page is not below {model.pages}")

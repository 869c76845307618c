"""The null driver: what it generates depends on a sequence's tokens alone, never on batch or placement.

Its KV cache holds the tokens that it was computed from, so a sequence that is started on pages that are not
its own, or were moved wrongly, is refused.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from llmos.drivers.null.pages import Pages, page_size
from llmos.drivers.null.slabs import DEFAULT_PAGES, SharedMemory, SlabPages, shared_bytes
from llmos.drivers.sdk.driver import (
    Driver,
    Finish,
    FinishAdapter,
    Get,
    Pending,
    PendingAdapter,
    PendingEncoding,
    PendingMove,
    PendingStep,
    Progress,
    Put,
)
from llmos.drivers.sdk.messages import (
    Device,
    DriverInfo,
    EncodedStep,
    EncodeStep,
    FinishReason,
    LoadAdapter,
    LoadedAdapter,
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
from llmos.drivers.sdk.tiers import HostTier, Tiers
from llmos.ipc.errors import Busy, InvalidArgument, NoMemory, NotFound

VOCABULARY = 256


def next_token(tokens: list[int], adapter: str = "") -> int:
    """The token that follows a sequence: a fixed function of its last token, its length and its adapter."""
    return (tokens[-1] * 31 + len(tokens) * 7 + 11 + zlib.crc32(adapter.encode())) % VOCABULARY


def vector(tokens: list[int], types: list[int]) -> list[float]:
    """What an encoder makes of a text: a fixed function of its tokens, their order and their types."""
    places = sum(place * token for place, token in enumerate(tokens, 1))
    return [float(len(tokens)), float(sum(tokens)), float(places), float(sum(types))]


def burst_of(tokens: list[int], burst: int) -> int:
    """How many tokens a sequence gains in a step: from 1 to ``burst``, as if some guesses had been right."""
    return 1 + (tokens[-1] + len(tokens) * 5) % burst


class _Sequence:
    def __init__(self, start: Start) -> None:
        self.start = start
        self.tokens = list(start.tokens)
        self.computed = start.cached
        self.table = list(start.pages)
        self.finished = False
        self.salt = zlib.crc32(start.adapter.encode())

    def room(self, page_tokens: int) -> int:
        """How many more tokens it can gain in the pages it has; the last one needs none."""
        return len(self.table) * page_tokens + 1 - len(self.tokens)

    def produce(self) -> FinishReason | None:
        """Gain a token; why the sequence ends with it, if it does."""
        token = next_token(self.tokens, self.start.adapter)
        self.tokens.append(token)
        if token in self.start.stop:
            return "stop"
        return "length" if len(self.tokens) >= self.start.limit else None


class _Cache:
    """The pages of one model, on the device and beside it."""

    def __init__(self, loaded: LoadedModel, shared: SharedMemory | None) -> None:
        self.device = Pages(loaded.pages, loaded.page_tokens)
        if shared is not None:
            self.device = SlabPages(shared, loaded.model, loaded.page_tokens)
        host = HostTier(loaded.host_pages, loaded.page_bytes)
        self.tiers = Tiers(loaded.model, loaded.page_bytes, host, loaded.disk_pages)


class NullDriver(Driver):
    """Takes ``step_ms`` milliseconds a step, ``prefill_us`` microseconds for each prompt token in it,
    ``decode_us`` for each sequence that decodes, ``move_us`` for each page that is moved, and ``park_ms`` to
    park a model or to wake it. With a ``kink`` only tokens beyond so many of a step, sequences and prompts
    together, take ``prefill_us``, as where products wait for memory. Where ``room`` is not 0, so many models
    fit on its device.

    The model named ``encoder`` is loaded as one. With a ``burst`` it gives up to so many tokens a step, as a
    driver that speculates. Of a mesh only the data axis counts: each replica has its own time.
    """

    def __init__(
        self,
        step_ms: float = 0.0,
        prefill_us: float = 0.0,
        decode_us: float = 0.0,
        move_us: float = 0.0,
        encoder: str = "",
        burst: int = 1,
        park_ms: float = 0.0,
        room: int = 0,
        kink: int = 0,
    ) -> None:
        self._encoder = encoder
        self._burst = burst
        self._step = step_ms / 1e3
        self._prefill = prefill_us / 1e6
        self._decode = decode_us / 1e6
        self._move = move_us / 1e6
        self._park = park_ms / 1e3
        self._room = room
        self._kink = kink
        self._parked: set[str] = set()
        self._models: dict[str, LoadedModel] = {}
        self._caches: dict[tuple[str, int], _Cache] = {}
        self._shared: dict[int, SharedMemory] = {}  # by replica
        self._slots: dict[tuple[str, int], dict[int, _Sequence]] = {}
        self._free_at: dict[int, float] = {}
        self._completed: dict[int, float] = {}
        self._adapters: dict[str, set[str]] = {}

    def describe(self) -> DriverInfo:
        return DriverInfo("null", "1", [Device(0, "other", "null")], ["float32"])

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        progress(LoadProgress("read", 1, 1))
        self._check_room()
        request = with_tiers(request, page_size(request.page_tokens), no_host=True)
        encodes = request.model == self._encoder
        loaded = LoadedModel(
            model=request.model,
            family="null",
            kind="encoder" if encodes else "decoder",
            width=4 if encodes else 0,
            token_types=2,
            parameters=0,
            weight_bytes=0,
            pages=0 if encodes else request.pages or DEFAULT_PAGES,
            page_tokens=request.page_tokens,
            page_bytes=page_size(request.page_tokens),
            slots=0 if encodes else request.slots,
            max_context=request.max_context,
            chunk_tokens=request.chunk_tokens,
            vocab_size=VOCABULARY,
            stop_tokens=[],
            attention="none",
            host_pages=request.host_pages,
            disk_pages=request.disk_pages,
            replicas=request.mesh.get("data", 1),
            adapters=request.adapters,
        )
        self._adapters[request.model] = set()
        if request.arena == "shared" and not encodes:
            loaded = self._in_shared_memory(loaded, request)
        self._models[request.model] = loaded
        for number in range(loaded.replicas):
            shared = self._shared[number] if loaded.pool else None
            self._caches[request.model, number] = _Cache(loaded, shared)
        self.reset(request.model)
        return loaded

    def _in_shared_memory(self, loaded: LoadedModel, request: LoadRequest) -> LoadedModel:
        for number in range(loaded.replicas):
            if number not in self._shared:
                self._shared[number] = SharedMemory(shared_bytes(request), loaded.page_bytes)
        shared = self._shared[0]
        slab_pages = shared.slab_pages(request)
        return msgspec.structs.replace(
            loaded,
            pages=shared.slabs * slab_pages,
            pool="shared",
            slabs=shared.slabs,
            slab_pages=slab_pages,
            slab_bytes=shared.slab_bytes,
        )

    def reset(self, model: str, replica: int = -1) -> None:
        if model not in self._models:
            raise NotFound(f"no model {model!r} is loaded here")
        for number in range(self._models[model].replicas) if replica < 0 else [replica]:
            self._slots[model, number] = {}

    def park(self, model: str) -> PendingMove:
        def finish() -> Moved:
            self._parked.add(model)
            self.reset(model)
            for number in range(0 if loaded.pool else loaded.replicas):
                self._caches[model, number].device = Pages(loaded.pages, loaded.page_tokens)
            return self._swapped()

        loaded = self._models[model]
        return lambda: self._carried(finish)

    def wake(self, model: str) -> PendingMove:
        self._check_room()
        self._parked.discard(model)
        return lambda: self._carried(self._swapped)

    def _carried(self, finish: Finish) -> Finish:
        time.sleep(self._park)
        return finish

    def _swapped(self) -> Moved:
        return Moved(0, round(self._park * 1e6))

    def _check_room(self) -> None:
        if self._room and len(self._models) - len(self._parked) >= self._room:
            raise NoMemory(f"{self._room} models fit on this device: park or unload one")

    def unload(self, model: str) -> None:
        self._parked.discard(model)
        loaded = self._models.pop(model, None)
        if loaded is None:
            raise NotFound(f"no model {model!r} is loaded here")
        for number in range(loaded.replicas):
            del self._slots[model, number]
            self._caches.pop((model, number)).tiers.close()
        if not any(each.pool for each in self._models.values()):
            self._shared.clear()

    def load_adapter(self, request: LoadAdapter) -> PendingAdapter:
        loaded, known = self._models[request.model], self._adapters[request.model]

        def read() -> FinishAdapter:
            if not (Path(request.source) / "adapter_config.json").is_file():
                raise InvalidArgument(f"{request.source} has no adapter_config.json")

            def finish() -> LoadedAdapter:
                if len(known) >= loaded.adapters:
                    raise Busy(f"all {loaded.adapters} adapters that fit are loaded: unload one")
                known.add(request.adapter)
                return LoadedAdapter(adapter=request.adapter, rank=1, bytes=0)

            return finish

        return read

    def unload_adapter(self, model: str, adapter: str) -> None:
        if adapter not in self._adapters[model]:
            raise NotFound(f"adapter {adapter} is not loaded here")
        replicas = [self._slots[model, number] for number in range(self._models[model].replicas)]
        if any(sequence.start.adapter == adapter for slots in replicas for sequence in slots.values()):
            raise Busy(f"adapter {adapter} is in use")
        self._adapters[model].remove(adapter)

    def move(self, move: Move, key: bytes) -> PendingMove:
        model, replica = move.model, move.replica
        tiers = self._caches[model, replica].tiers
        sources, targets = [source for source, _ in move.pages], [target for _, target in move.pages]
        if move.source == "device":
            return self.save(
                model, replica, sources, lambda i, data: tiers.put(move.target, targets[i], data, key)
            )
        if move.target == "device":
            return self.restore(
                model, replica, targets, lambda i: bytes(tiers.get(move.source, sources[i], key))
            )
        return tiers.move(move, key)

    def save(self, model: str, replica: int, pages: list[int], put: Put) -> PendingMove:
        device, began = self._caches[model, replica].device, time.monotonic()
        # Copies: the steps that follow may write these pages.
        read = [bytes(device[page]) for page in pages]

        def copy() -> Finish:
            for index, page in enumerate(read):
                put(index, page)
            return self._moved(read, began)

        return copy

    def restore(self, model: str, replica: int, pages: list[int], get: Get) -> PendingMove:
        device, began = self._caches[model, replica].device, time.monotonic()

        def copy() -> Finish:
            written = [bytes(get(index)) for index in range(len(pages))]
            moved = self._moved(written, began)

            def finish() -> Moved:
                device.give(pages)
                for page, data in zip(pages, written, strict=True):
                    device[page][:] = data
                return moved()

            return finish

        return copy

    def _moved(self, pages: list[bytes], began: float) -> Finish:
        if self._move:
            time.sleep(self._move * len(pages))
        moved = Moved(sum(map(len, pages)), round((time.monotonic() - began) * 1e6))
        return lambda: moved

    def encode(self, request: EncodeStep) -> PendingEncoding:
        model = self._models.get(request.model)
        if model is None or model.kind != "encoder":
            raise NotFound(f"no encoder {request.model!r} is loaded here")
        longest = max(len(text) for text in request.texts)
        if longest * len(request.texts) > max(model.chunk_tokens, longest):
            raise InvalidArgument(f"{len(request.texts)} texts of up to {longest} tokens exceed a step")
        types = request.types or [[]] * len(request.texts)
        rows = [vector(*text) for text in zip(request.texts, types, strict=True)]
        packed = b"".join(struct.pack("<4f", *row) for row in rows)
        cost = self._step + self._prefill * longest * len(rows)
        ends = self._after(cost)

        def wait() -> EncodedStep:
            _sleep_until(ends)
            return EncodedStep(packed, 4, round(cost * 1e6))

        return Pending(wait, lambda: time.monotonic() >= ends)

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        model = self._models.get(quantum.model)
        if model is None:
            raise NotFound(f"no model {quantum.model!r} is loaded here")
        if not 0 <= quantum.replica < model.replicas:
            raise InvalidArgument(f"model {quantum.model!r} has no replica {quantum.replica}")
        slots = self._slots[quantum.model, quantum.replica]
        cache = self._caches[quantum.model, quantum.replica]
        _check(quantum, slots, model)
        for start in quantum.start:
            if start.adapter and start.adapter not in self._adapters[quantum.model]:
                raise InvalidArgument(f"slot {start.slot}: adapter {start.adapter} is not loaded")
            salt = zlib.crc32(start.adapter.encode())
            cache.device.check(start.pages, start.tokens[: start.cached], salt)
            cache.device.give(start.pages[-(-start.cached // model.page_tokens) :])
        for growth in quantum.grow:
            cache.device.give(growth.pages)
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
            if self._burst > 1:  # who plans the pages may be behind: without one a sequence holds still
                ready = [s for s in ready if slots[s].room(pages.page_tokens) > 0]
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
        seats: list[int] = []
        tokens: list[int] = []
        finished: list[tuple[int, FinishReason]] = []
        for slot in ready:
            sequence = slots[slot]
            if sequence.room(pages.page_tokens) < 1:
                raise InvalidArgument(
                    f"slot {slot}: {len(sequence.tokens)} tokens exceed its {len(sequence.table)} pages"
                )
            count = min(burst_of(sequence.tokens, self._burst), sequence.room(pages.page_tokens))
            end: FinishReason | None = None
            while count and end is None:
                _compute(slot, sequence, len(sequence.tokens), pages)
                end = sequence.produce()
                seats.append(slot)
                tokens.append(sequence.tokens[-1])
                count -= 1
            if end is not None:
                finished.append((slot, end))
        for slot, _ in finished:
            slots[slot].finished = True
        shown = max(0, len(ready) + prefilled - self._kink) if self._kink else prefilled
        replica, begun = quantum.replica, time.monotonic()
        ends = self._after(self._step + self._prefill * shown + self._decode * len(ready), replica)

        def wait() -> Step:
            _sleep_until(ends)
            now = time.monotonic()
            since, self._completed[replica] = max(begun, self._completed.get(replica, 0.0)), now
            return Step(quantum.id, index, seats, tokens, finished, round((now - since) * 1e6))

        return Pending(wait, lambda: time.monotonic() >= ends)

    def _after(self, cost: float, replica: int = 0) -> float:
        """When a step that is dispatched now will be done: after those before it."""
        self._free_at[replica] = max(time.monotonic(), self._free_at.get(replica, 0.0)) + cost
        return self._free_at[replica]


def _sleep_until(then: float) -> None:
    if (left := then - time.monotonic()) > 0:
        time.sleep(left)


def _decodes(sequence: _Sequence) -> bool:
    return sequence.computed >= len(sequence.tokens) - 1 and len(sequence.tokens) > len(sequence.start.tokens)


def _compute(slot: int, sequence: _Sequence, stop: int, pages: Pages) -> None:
    """Bring the KV of a sequence to its first ``stop`` tokens."""
    if stop > len(sequence.table) * pages.page_tokens:
        raise InvalidArgument(f"slot {slot}: {stop} tokens exceed its {len(sequence.table)} pages")
    pages.write(sequence.table, sequence.tokens, sequence.computed, stop, sequence.salt)
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

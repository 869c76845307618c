"""Which model of the manifest is where, and in what state. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmos.drivers.sdk.messages import LoadedAdapter, LoadedModel, LoadProgress, LoadRequest
from llmos.ipc.errors import IOFailure, LLMOSError, NotFound
from llmos.services import manifest
from llmos.services.manifest import ModelSpec
from llmos.services.models.messages import ANSWERING, ModelLine, ModelState
from llmos.services.models.residence import Residence
from llmos.services.models.template import ChatTemplate
from llmos.services.models.tokenizer import ModelTokenizer

Waiter = Callable[[LLMOSError | None], None]


@dataclass(eq=False)
class Adapter:
    """An adapter of a model: its folder, what it is called inside once its files were read, and whether the
    driver has it."""

    name: str
    source: Path
    identity: str = ""
    loaded: LoadedAdapter | None = None
    error: LLMOSError | None = None


class Model:
    """One model: its files, its tokenizer, the driver that has it or is loading it, and whether the
    scheduler knows. Whoever waits is told once it is ready, or told the error that keeps it from being so.
    A parked model is ready: the scheduler takes tasks for it, and they wait while it is woken. ``woke`` is
    how many seconds that took the last time.
    """

    def __init__(self, spec: ModelSpec, source: Path | None) -> None:
        self.spec = spec
        self.source = source
        self.tokenizer: ModelTokenizer | None = None
        self.template: ChatTemplate | None = None
        self.fingerprint = ""
        self.loaded: LoadedModel | None = None
        self.loading = False
        self.adapted = False
        self.hosted = False
        self.residence: Residence = "awake"
        self.woke = 0.0
        self.parkable = True
        self.wanted = True
        self.error: LLMOSError | None = None
        self.progress = LoadProgress("read", 0, 0)
        folders = {name: Path(path).expanduser().absolute() for name, path in spec.adapters.items()}
        self.adapters = {name: Adapter(name, folder) for name, folder in folders.items()}
        self._waiters: list[tuple[Waiter, bool]] = []

    @property
    def ready(self) -> bool:
        return self.hosted and self.tokenizer is not None

    def trouble(self) -> LLMOSError | None:
        """Why waiting would be in vain."""
        name = self.spec.name
        if self.source is None:
            return NotFound(f"the files of model {name!r} are missing: llmos pull {name}")
        if not self.wanted:
            return NotFound(f"model {name!r} is not loaded: llmos load {name}")
        if self.error is not None:
            return IOFailure(f"model {name!r} could not be loaded: {self.error}")
        return None

    @property
    def identities(self) -> list[str]:
        """The adapters that tasks can have."""
        return [each.identity for each in self.adapters.values() if each.loaded is not None]

    def adapter(self, name: str) -> str:
        """What a loaded adapter is called inside; empty for no name."""
        if not name:
            return ""
        found = self.adapters.get(name)
        if found is None:
            known = ", ".join(self.adapters) or "none"
            raise NotFound(f"model {self.spec.name!r} has no adapter {name!r}; there is: {known}")
        if found.error is not None or found.loaded is None:
            raise IOFailure(f"adapter {name!r} could not be loaded: {found.error or 'it is being loaded'}")
        return found.identity

    def wait(self, waiter: Waiter, *, for_driver: bool = True) -> None:
        """Tell ``waiter`` once, maybe at once; without ``for_driver`` as soon as there is a tokenizer."""
        self._waiters.append((waiter, for_driver))
        self.settle()

    def settle(self) -> None:
        """Tell those who wait for what has been decided by now."""
        trouble = self.trouble()
        told: list[tuple[Waiter, bool]] = []
        kept: list[tuple[Waiter, bool]] = []
        for waiter, for_driver in self._waiters:
            decided = trouble or self.ready or (self.tokenizer is not None and not for_driver)
            (told if decided else kept).append((waiter, for_driver))
        self._waiters = kept
        for waiter, _ in told:
            waiter(trouble)

    def forget(self, waiter: Waiter) -> None:
        """Tell ``waiter`` nothing any more."""
        self._waiters = [entry for entry in self._waiters if entry[0] is not waiter]

    def lost(self) -> None:
        """The driver is gone, and with it whatever it had loaded."""
        self.loaded = None
        self.loading = self.adapted = self.hosted = False
        self.residence, self.parkable = "awake", True
        for adapter in self.adapters.values():
            adapter.loaded = None
        self.progress = LoadProgress("read", 0, 0)

    def line(self) -> ModelLine:
        """The model as it is listed."""
        loaded, progress = self.loaded, self.progress
        return ModelLine(
            name=self.spec.name,
            state=self._state(),
            driver=self.spec.driver,
            family=loaded.family if loaded else "",
            parameters=loaded.parameters if loaded else 0,
            context=loaded.max_context if loaded else 0,
            attention=loaded.attention if loaded else "",
            created=_created(self.source),
            progress=1.0 if loaded else progress.done / progress.total if progress.total else 0.0,
            phase=progress.phase if self.loading else "",
            error=str(self.error or ""),
            phases=loaded.phases if loaded else {},
            kind=loaded.kind if loaded else "decoder",
            mesh=self.spec.mesh,
            woke=self.woke,
            sums=loaded.sums if loaded else "",
        )

    def adapter_line(self, adapter: Adapter) -> ModelLine:
        """An adapter as it is listed: as a model of its own."""
        whole = self.line()
        state = "failed" if adapter.error else "loading" if adapter.loaded is None else whole.state
        return msgspec.structs.replace(
            whole,
            name=f"{self.spec.name}:{adapter.name}",
            state=state if whole.state in ANSWERING else whole.state,
            created=_created(adapter.source),
            error=str(adapter.error or whole.error),
            parent=self.spec.name,
        )

    def lines(self) -> list[ModelLine]:
        """The model, and its adapters."""
        return [self.line(), *map(self.adapter_line, self.adapters.values())]

    def _state(self) -> ModelState:
        if self.source is None:
            return "missing"
        if self.error is not None:
            return "failed"
        if not self.wanted:
            return "unloaded"
        if not self.ready:
            return "loading"
        return _READY[self.residence]


_READY: dict[Residence, ModelState] = {
    "awake": "ready",
    "parking": "parked",
    "parked": "parked",
    "waking": "waking",
}


def _created(source: Path | None) -> int:
    try:
        return int(source.stat().st_mtime) if source else 0
    except OSError:
        return 0


def load_request(model: Model, cache: Path) -> LoadRequest:
    """What the driver is asked to load."""
    spec = model.spec
    return LoadRequest(
        model=spec.name,
        source=str(model.source),
        cache=str(cache / "converted"),
        dtype=spec.dtype,
        weights=spec.weights,
        kv_dtype=spec.kv_dtype,
        page_tokens=spec.page_tokens,
        pages=spec.pages,
        slots=spec.slots,
        max_context=spec.max_context,
        chunk_tokens=spec.chunk_tokens,
        mesh=spec.mesh,
        host_bytes=manifest.size(spec.host_cache),
        disk_bytes=manifest.size(spec.disk_cache),
        host_pages=spec.host_pages,
        disk_pages=spec.disk_pages,
        speculation=spec.speculation,
        speculation_tokens=spec.speculation_tokens,
        draft=str(Path(spec.draft).expanduser().absolute()) if spec.draft else "",
        arena=spec.arena,
        arena_bytes=manifest.size(spec.arena_size),
        adapters=spec.max_adapters or len(spec.adapters),
        adapter_rank=spec.adapter_rank,
    )

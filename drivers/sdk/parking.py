"""Models whose weights are in host memory, and those on the way there or back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

from llmos.drivers.sdk.driver import Driver, Finish, PendingMove
from llmos.drivers.sdk.messages import Moved
from llmos.ipc.background import Background
from llmos.ipc.errors import Busy, Canceled, LLMOSError


class Refusable(Protocol):
    """Whoever waits for a model to arrive."""

    def fail(self, error: LLMOSError) -> None: ...


class Sink(Refusable, Protocol):
    """Where the result of parking or waking goes."""

    def done(self, moved: Moved) -> None: ...


class _Passage:
    """A model on its way; ``waiting`` is what comes after it, and who is told if it does not."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.copying: Future[Finish] | None = None
        self.waiting: list[tuple[Refusable, Callable[[], None]]] = []


class Parking:
    """Used from the driver's thread, beside which ``background`` copies; ``abandon`` cancels what is under
    way for a model."""

    def __init__(self, driver: Driver, background: Background, abandon: Callable[[str], None]) -> None:
        self._driver = driver
        self._background = background
        self._abandon = abandon
        self._parked: set[str] = set()
        self._passages: dict[str, _Passage] = {}

    def check(self, model: str) -> None:
        """Refuse what needs the weights of a model that is parked or on its way: Busy."""
        if model in self._parked or model in self._passages:
            raise Busy(f"model {model!r} is parked: wake it first", parked=True)

    def parked(self, model: str) -> bool:
        return model in self._parked

    def arrived(self, model: str, who: Refusable, then: Callable[[], None]) -> None:
        """Call ``then`` once a model is on no way, maybe at once."""
        if model in self._passages:
            self._passages[model].waiting.append((who, then))
        else:
            then()

    def park(self, model: str, sink: Sink) -> None:
        """Have a loaded model parked; at once where it is."""
        self.arrived(model, sink, lambda: self._begin(model, sink, to_host=True))

    def wake(self, model: str, sink: Sink) -> None:
        """Have a loaded model woken; at once where it is awake."""
        self.arrived(model, sink, lambda: self._begin(model, sink, to_host=False))

    def forget(self, model: str) -> None:
        """A model is to be unloaded: what is being copied is waited for, since it may be gone next."""
        self._parked.discard(model)
        passage = self._passages.pop(model, None)
        if passage is None:
            return
        wait([passage.copying] if passage.copying is not None else [])
        for who in (passage.sink, *(who for who, _ in passage.waiting)):
            who.fail(Canceled("the model was unloaded"))

    def _begin(self, model: str, sink: Sink, to_host: bool) -> None:
        if to_host == (model in self._parked):
            sink.done(Moved(0, 0))
            return
        try:
            pending = self._pending(model, to_host)
        except LLMOSError as error:
            sink.fail(error)
            return
        passage = self._passages[model] = _Passage(sink)
        passage.copying = self._background.run(
            pending, lambda copied: self._arrive(model, passage, copied, to_host)
        )

    def _pending(self, model: str, to_host: bool) -> PendingMove:
        if not to_host:
            return self._driver.wake(model)
        self._abandon(model)
        return self._driver.park(model)

    def _arrive(self, model: str, passage: _Passage, copied: Future[Finish], to_host: bool) -> None:
        if self._passages.get(model) is not passage:
            return
        del self._passages[model]
        try:
            moved = copied.result()()
        except LLMOSError as error:
            passage.sink.fail(error)
        else:
            (self._parked.add if to_host else self._parked.discard)(model)
            passage.sink.done(moved)
        for who, then in passage.waiting:
            self.arrived(model, who, then)

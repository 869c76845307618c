"""The driver process: messages in, results out; an author's callbacks run in between."""

from __future__ import annotations

import time
from pathlib import Path

from llmos.drivers.sdk.driver import Driver
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import (
    DriverInfo,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Move,
    Moved,
    Preempt,
    Quantum,
    QuantumDone,
    Reset,
    Step,
    Unload,
)
from llmos.drivers.sdk.moves import Moves, check_move
from llmos.ipc.background import Background
from llmos.ipc.errors import LLMOSError, NotFound
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Beat

LOAD_LIMIT = 900.0
STEP_LIMIT = 60.0
PROGRESS_SECONDS = 0.2


class _CallSink:
    """Sends the results of a quantum as the answers of the call that brought it."""

    def __init__(self, call: Incoming) -> None:
        self._call = call

    def step(self, step: Step) -> None:
        self._call.chunk(step)

    def done(self, done: QuantumDone) -> None:
        self._call.end(done)

    def fail(self, error: LLMOSError) -> None:
        self._call.fail(error)


class _MoveSink:
    """Sends the result of a move as the answer of the call that asked for it."""

    def __init__(self, call: Incoming) -> None:
        self._call = call

    def done(self, moved: Moved) -> None:
        self._call.reply(moved)

    def fail(self, error: LLMOSError) -> None:
        self._call.fail(error)


class DriverServer(Server):
    """Serves one driver under the name ``driver.NAME``."""

    def __init__(self, name: str, driver: Driver, run: Path | None = None) -> None:
        super().__init__(run, f"driver.{name}")
        self._driver = driver
        self._executor = Executor(driver)
        self._background = Background(self)
        self._moves = Moves(driver, self._executor, self._background)
        self._limit = STEP_LIMIT
        self._loaded: dict[str, tuple[LoadRequest, LoadedModel]] = {}

    def work(self) -> bool:
        return self._executor.advance()

    def beat(self) -> Beat:
        return Beat(self.progress, self._limit)

    def stop(self) -> None:
        for model in list(self._loaded):
            self._forget(model)
        self._background.close()

    def on_kernel_restart(self) -> None:
        self._abandon()

    @method
    def describe(self, request: None, call: Incoming) -> DriverInfo:
        return self._driver.describe()

    @method
    def load(self, request: LoadRequest, call: Incoming) -> Later:
        """Chunks are ``LoadProgress``, the end is ``LoadedModel``. What is loaded already is not loaded
        again: whoever asked before may have been started anew."""
        known = self._loaded.get(request.model)
        if known is not None and known[0] == request:
            call.end(known[1])
            return Later()
        if known is not None:
            self._forget(request.model)
        told = 0.0

        def progress(state: LoadProgress) -> None:
            nonlocal told
            self.progress += 1
            if time.monotonic() - told >= PROGRESS_SECONDS or state.done == state.total:
                told = time.monotonic()
                call.chunk(state)
                self.control.verb("beat", self.beat())

        self._limit = LOAD_LIMIT
        self.control.verb("beat", self.beat())
        try:
            loaded = self._driver.load(request, progress)
        finally:
            self._limit = STEP_LIMIT
        self._loaded[request.model] = request, loaded
        call.end(loaded)
        return Later()

    @method
    def execute(self, request: Quantum, call: Incoming) -> Later:
        """Chunks are ``Step``, the end is ``QuantumDone``."""
        self._executor.submit(request, _CallSink(call))
        return Later()

    @method
    def move(self, request: Move, call: Incoming) -> Later:
        """The reply is ``Moved``."""
        if request.model not in self._loaded:
            raise NotFound(f"no model {request.model!r} is loaded here")
        check_move(request, self._loaded[request.model][1])
        self._moves.submit(request, b"", _MoveSink(call))
        return Later()

    @method
    def preempt(self, request: Preempt, call: Incoming) -> None:
        self._executor.preempt(request.quantum)

    @method
    def reset(self, request: Reset, call: Incoming) -> None:
        self._abandon()
        self._driver.reset(request.model)

    @method
    def unload(self, request: Unload, call: Incoming) -> None:
        self._forget(request.model)

    def _forget(self, model: str) -> None:
        self._abandon()
        self._driver.unload(model)
        self._loaded.pop(model, None)

    def _abandon(self) -> None:
        self._executor.abandon()
        self._moves.abandon()

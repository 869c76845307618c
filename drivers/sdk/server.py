"""The driver process: messages in, results out; an author's callbacks run in between."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import msgspec

from llmos.drivers.sdk import saving
from llmos.drivers.sdk.adapters import Adapters
from llmos.drivers.sdk.driver import Driver
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.keys import StorageKeys
from llmos.drivers.sdk.messages import (
    Cut,
    DriverInfo,
    EncodedStep,
    EncodeStep,
    LoadAdapter,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Move,
    Moved,
    OpenTask,
    Park,
    Preempt,
    Quantum,
    QuantumDone,
    Reset,
    RestoreTask,
    SaveTask,
    Step,
    TaskOpened,
    Unload,
    UnloadAdapter,
    Wake,
)
from llmos.drivers.sdk.moves import Moves, check_move
from llmos.drivers.sdk.parking import Parking
from llmos.drivers.sdk.saved import SavedFile
from llmos.ipc.background import Background
from llmos.ipc.errors import LLMOSError, NotFound
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Beat
from llmos.services import saved

LOAD_LIMIT = 900.0
STEP_LIMIT = 60.0
PROGRESS_SECONDS = 0.2


class _CallSink:
    """Sends the results of a quantum, or of an encoder's step, as the answers of the call that brought it."""

    def __init__(self, call: Incoming) -> None:
        self._call = call

    def step(self, step: Step) -> None:
        self._call.chunk(step)

    def done(self, done: QuantumDone) -> None:
        self._call.end(done)

    def encoded(self, result: EncodedStep) -> None:
        self._call.reply(result)

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
        self._moves = Moves(self._executor, self._background)
        # Of whole models and of adapters, which take longer than pages: the first has programs compiled.
        self._copying = Background(self)
        self._parking = Parking(driver, self._copying, self._abandon)
        self._adapters = Adapters(driver, self._executor, self._copying, self._parking.check)
        self._keys = StorageKeys(self)
        self._limit = STEP_LIMIT
        self._loaded: dict[str, tuple[LoadRequest, LoadedModel]] = {}

    def work(self) -> bool:
        """The next step is dispatched as late as it may be: what arrives until then can be part of it."""
        if pause := self._executor.pause():
            self.after(pause, _nothing)
            return False
        return self._executor.advance() or self._driver.idle()

    def beat(self) -> Beat:
        return Beat(self.progress, self._limit)

    def stop(self) -> None:
        for model in list(self._loaded):
            self._forget(model)
        self._background.close()
        self._copying.close()

    def on_kernel_restart(self) -> None:
        self._abandon()

    @method
    def describe(self, request: None, call: Incoming) -> DriverInfo:
        return self._driver.describe()

    @method
    def load(self, request: LoadRequest, call: Incoming) -> Later:
        """Chunks are ``LoadProgress``, the end is ``LoadedModel``. What is loaded already is not loaded
        again, nor woken: whoever asked before may have been started anew."""
        self._parking.arrived(request.model, call, lambda: self._load_settled(request, call))
        return Later()

    def _load_settled(self, request: LoadRequest, call: Incoming) -> None:
        known = self._loaded.get(request.model)
        if known is not None and known[0] == request:
            parked = self._parking.parked(request.model)
            if not parked:  # there they stay, to be found by whoever asks for them
                self._adapters.clear(request.model)
            call.end(msgspec.structs.replace(known[1], parked=parked))
            return
        if known is not None:
            self._forget(request.model)
        try:
            loaded = self._load(request, call)
        except LLMOSError as error:
            call.fail(error)
            return
        self._loaded[request.model] = request, loaded
        call.end(loaded)

    def _load(self, request: LoadRequest, call: Incoming) -> LoadedModel:
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
            return self._driver.load(request, progress)
        finally:
            self._limit = STEP_LIMIT

    @method
    def execute(self, request: Quantum, call: Incoming) -> Later:
        """Chunks are ``Step``, the end is ``QuantumDone``."""
        self._parking.check(request.model)
        self._executor.submit(request, _CallSink(call))
        return Later()

    @method
    def encode(self, request: EncodeStep, call: Incoming) -> Later:
        """Answers ``EncodedStep``."""
        self._parking.check(request.model)
        self._executor.encode(request, _CallSink(call))
        return Later()

    @method
    def move(self, request: Move, call: Incoming) -> Later:
        """The reply is ``Moved``."""
        check_move(request, self._model(request.model))
        if "disk" in (request.source, request.target):
            self._keys.use(request.tenant, "pages", call, lambda key: self._submit(request, key, call))
        else:
            self._submit(request, b"", call)
        return Later()

    @method
    def save(self, request: SaveTask, call: Incoming) -> Later:
        """The reply is ``TaskSaved``."""
        saving.check_pages(request.pages, request.replica, self._model(request.model))
        saved.path_of(request.name)

        def begin(key: bytes) -> None:
            loaded, layout = self._model(request.model), self._layout(request.model)
            task = saving.Saving(self._driver, request, loaded, layout, key)
            self._moves.submit(
                request.model, request.replica, task.begin, saving.SavedSink(task, call), reads_device=True
            )

        self._keys.use(request.tenant, "tasks", call, begin)
        return Later()

    @method
    def open(self, request: OpenTask, call: Incoming) -> Later:
        """The reply is ``TaskOpened``."""

        def read(key: bytes) -> None:
            with closing(SavedFile(request.name, key)) as file:
                call.reply(TaskOpened(file.contents.state))

        self._keys.use(request.tenant, "tasks", call, read)
        return Later()

    @method
    def restore(self, request: RestoreTask, call: Incoming) -> Later:
        """The reply is ``Moved``."""
        saving.check_pages(request.pages, request.replica, self._model(request.model))

        def begin(key: bytes) -> None:
            self._model(request.model)
            layout = self._layout(request.model)
            start = lambda: saving.restore(self._driver, request, layout, key)  # noqa: E731
            self._moves.submit(request.model, request.replica, start, _MoveSink(call), reads_device=False)

        self._keys.use(request.tenant, "tasks", call, begin)
        return Later()

    @method
    def preempt(self, request: Preempt, call: Incoming) -> Cut:
        """Answered at once, while the steps that were dispatched are still being computed."""
        return Cut(self._executor.preempt(request.quantum))

    @method
    def reset(self, request: Reset, call: Incoming) -> None:
        self._parking.check(request.model)
        self._abandon(request.model, request.replica)
        self._driver.reset(request.model, request.replica)

    @method
    def park(self, request: Park, call: Incoming) -> Later:
        """The reply is ``Moved``. What is under way for the model is cancelled, as by a reset."""
        self._known(request.model)
        self._parking.park(request.model, _MoveSink(call))
        return Later()

    @method
    def wake(self, request: Wake, call: Incoming) -> Later:
        """The reply is ``Moved``."""
        self._known(request.model)
        self._parking.wake(request.model, _MoveSink(call))
        return Later()

    @method
    def unload(self, request: Unload, call: Incoming) -> None:
        self._forget(request.model)

    @method
    def load_adapter(self, request: LoadAdapter, call: Incoming) -> Later:
        """The reply is ``LoadedAdapter``."""
        self._model(request.model)
        self._adapters.load(request, call)
        return Later()

    @method
    def unload_adapter(self, request: UnloadAdapter, call: Incoming) -> None:
        self._model(request.model)
        self._adapters.unload(request)

    def _submit(self, move: Move, key: bytes, call: Incoming) -> None:
        # Its model may have been unloaded while the key was fetched.
        self._model(move.model)
        begin = lambda: self._driver.move(move, key)  # noqa: E731
        self._moves.submit(
            move.model, move.replica, begin, _MoveSink(call), reads_device=move.source == "device"
        )

    def _model(self, name: str) -> LoadedModel:
        """A model that is loaded and awake."""
        self._parking.check(name)
        return self._known(name)

    def _known(self, name: str) -> LoadedModel:
        if name not in self._loaded:
            raise NotFound(f"no model {name!r} is loaded here")
        return self._loaded[name][1]

    def _layout(self, model: str) -> str:
        """What the bytes of a page mean here: pages go only where this is the same."""
        request, loaded = self._loaded[model]
        parts = (self._driver.describe().driver, loaded.family, loaded.attention, request.kv_dtype)
        return ":".join((*parts, str(loaded.page_tokens), str(loaded.page_bytes)))

    def _forget(self, model: str) -> None:
        self._abandon(model)
        self._parking.forget(model)
        self._adapters.forget(model)
        self._driver.unload(model)
        self._loaded.pop(model, None)

    def _abandon(self, model: str = "", replica: int = -1) -> None:
        self._executor.abandon(model, replica)
        self._moves.abandon(model, replica)


def _nothing() -> None:
    """The loop turns; that is all that is wanted of a timer."""

"""Gets the manifest's models onto their drivers, tells the scheduler; again after a crash of either."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path

from llmos.drivers.sdk.messages import LoadedModel, LoadProgress
from llmos.drivers.sdk.messages import Unload as UnloadRequest
from llmos.ipc import calls, codec
from llmos.ipc.background import Background
from llmos.ipc.errors import Busy, HostDown, LLMOSError, NoMemory, NotFound, TimedOut
from llmos.ipc.header import Kind
from llmos.ipc.server import Incoming, Server
from llmos.services.manifest import Manifest, ModelSpec
from llmos.services.models import store, tokenizer
from llmos.services.models.adapters import Adapters
from llmos.services.models.fingerprint import fingerprint
from llmos.services.models.hosting import Model, load_request
from llmos.services.models.parking import Parking
from llmos.services.models.template import ChatTemplate
from llmos.services.models.tokenizer import ModelTokenizer
from llmos.services.scheduler.messages import Host, Unhost

log = logging.getLogger("llmos.models")
DRIVER = "driver."
RETRY_SECONDS = 0.2


class Loader:
    """All models of the manifest, and the messages that move them."""

    def __init__(self, server: Server, manifest: Manifest, cache: Path) -> None:
        self._server = server
        self._cache = cache
        self._background = Background(server)
        self.adapters = Adapters(server, self._background)
        self._drivers: dict[str, int] = {}
        self._scheduler = 0
        self._followers: dict[str, list[Incoming]] = {}
        self._parking = Parking(server, self._host, self._on_driver)
        self.models = {spec.name: Model(spec, find_source(spec)) for spec in manifest.models}

    def start(self) -> None:
        """Read the tokenizers; the drivers are told when they come up."""
        for model in self.models.values():
            self._read_tokenizer(model)

    def close(self) -> None:
        self._background.close()

    def model(self, name: str) -> Model:
        """A model by its name; NotFound lists those there are."""
        model = self.models.get(name)
        if model is None:
            raise NotFound(f"no model {name!r} is served here; there is: {', '.join(self.models)}")
        return model

    # --- services that come and go ---

    def on_up(self, name: str, connection: int) -> None:
        if name == "scheduler":
            self._scheduler = connection
            for model in self.models.values():
                model.hosted = False
                self._host(model)
        elif name.startswith(DRIVER):
            driver = name.removeprefix(DRIVER)
            self._drivers[driver] = connection
            for model in self._on_driver(driver):
                self._lost(model)
                self._load(model)

    def on_down(self, name: str, connection: int) -> None:
        if name == "scheduler" and connection == self._scheduler:
            self._scheduler = 0
            for model in self.models.values():
                model.hosted = False
        driver = name.removeprefix(DRIVER)
        if name.startswith(DRIVER) and self._drivers.get(driver) == connection:
            del self._drivers[driver]
            for model in self._on_driver(driver):
                self._unhost(model)
                self._lost(model)

    def forget_all(self) -> None:
        """The kernel was started anew: who is up will be told again."""
        self._drivers.clear()
        self._scheduler = 0
        self._followers.clear()
        for model in self.models.values():
            self._lost(model)

    def _lost(self, model: Model) -> None:
        model.lost()
        self._parking.lost(model)

    def _on_driver(self, driver: str) -> list[Model]:
        return [model for model in self.models.values() if model.spec.driver == driver]

    # --- loading ---

    def load(self, model: Model, call: Incoming) -> None:
        """Load a model on request, telling the call how far it is until it ends."""
        model.source = find_source(model.spec)
        if not model.ready:
            model.wanted, model.error = True, None
            self._read_tokenizer(model)
            self._load(model)
        followers = self._followers.setdefault(model.spec.name, [])
        followers.append(call)

        def done(error: LLMOSError | None) -> None:
            if call in followers:
                followers.remove(call)
            if error is not None:
                call.fail(error)
            else:
                call.end(model.line())

        def withdrawn() -> None:
            model.forget(done)
            self._parking.forget(done)
            followers.remove(call)

        call.on_cancel = withdrawn
        if model.residence == "awake":
            model.wait(done)
        else:
            self._parking.wake(model, done)

    def unload(self, model: Model, call: Incoming) -> None:
        """Take a model from its driver; the call is answered when its memory is free."""
        was_loaded = model.loaded is not None
        model.wanted = False
        self._unhost(model)
        self._lost(model)
        model.settle()
        if not was_loaded or model.spec.driver not in self._drivers:
            call.reply(None)
            return

        def done(answer: calls.Answer) -> None:
            if answer.error is not None and answer.error.code != "EHOSTDOWN":
                call.fail(answer.error)
            else:
                call.reply(None)

        target = f"{DRIVER}{model.spec.driver}.unload"
        self._server.call(target, UnloadRequest(model.spec.name), done)

    def _load(self, model: Model) -> None:
        blocked = model.source is None or not model.wanted or model.error is not None
        if blocked or model.loading or model.loaded is not None or model.spec.driver not in self._drivers:
            return
        model.loading = True
        connection = self._drivers[model.spec.driver]

        def listener(answer: calls.Answer) -> None:
            # A driver that was restarted is loading it anew; this is the word of its predecessor.
            if model.loading and self._drivers.get(model.spec.driver) == connection:
                self._on_load(model, answer)

        log.info("loading %s onto %s", model.spec.name, model.spec.driver)
        target = f"{DRIVER}{model.spec.driver}.load"
        self._server.call(target, load_request(model, self._cache), listener)

    def _on_load(self, model: Model, answer: calls.Answer) -> None:
        if answer.kind == Kind.CHUNK:
            model.progress = codec.decode(answer.body, LoadProgress)
            for call in self._followers.get(model.spec.name, []):
                call.chunk(model.progress)
            return
        model.loading = False
        if isinstance(answer.error, HostDown):
            return
        if isinstance(answer.error, NoMemory):
            self._make_room(model, answer.error)
            return
        if answer.error is not None:
            self._fail(model, answer.error)
            return
        model.loaded = codec.decode(answer.body, LoadedModel)
        model.residence = "parked" if model.loaded.parked else "awake"
        log.info("%s is loaded: %s", model.spec.name, model.loaded.phases)
        self.adapters.restore(model, lambda: self._adapted(model))

    def _adapted(self, model: Model) -> None:
        model.adapted = True
        self._host(model)

    def _make_room(self, model: Model, error: NoMemory) -> None:
        self._parking.make_room(
            model,
            wanting=lambda: model.wanted and model.loaded is None and not model.loading,
            then=lambda: self._load(model),
            otherwise=lambda: self._fail(model, error),
        )

    # --- parking ---

    def park(self, model: Model, call: Incoming) -> None:
        """Park a model once it has no task; one that comes meanwhile is served first."""
        left = False

        def withdrawn() -> None:
            nonlocal left
            left = True

        def done(error: LLMOSError | None) -> None:
            if isinstance(error, Busy):
                self._server.after(RETRY_SECONDS, attempt)
            elif error is not None:
                call.fail(error)
            else:
                call.reply(model.line())

        def attempt() -> None:
            if (trouble := model.trouble()) is not None:
                call.fail(trouble)
            elif not left:
                self._parking.park(model, done)

        call.on_cancel = withdrawn
        attempt()

    def wake(self, model: Model, call: Incoming) -> None:
        """Wake a model; one that is being loaded is waited for."""

        def done(error: LLMOSError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                call.reply(model.line())

        def withdrawn() -> None:
            model.forget(ready)
            self._parking.forget(done)

        def ready(error: LLMOSError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                self._parking.wake(model, done)

        call.on_cancel = withdrawn
        model.wait(ready)

    def _fail(self, model: Model, error: LLMOSError) -> None:
        log.error("%s failed: %s", model.spec.name, error)
        model.error = error
        model.settle()
        self._parking.lost(model, error)

    # --- the scheduler ---

    def _host(self, model: Model) -> None:
        if not self._scheduler or model.loaded is None or model.residence in ("parking", "waking"):
            return
        if not model.adapted:
            return
        if model.residence == "parked":
            self._parking.declare(model, lambda _: None)
            return
        scheduler, loaded = self._scheduler, model.loaded

        def listener(answer: calls.Answer) -> None:
            if self._scheduler != scheduler or model.loaded is not loaded or model.residence != "awake":
                return
            if answer.error is None:
                model.hosted = True
                model.settle()
                self._parking.watch(model)
            elif isinstance(answer.error, HostDown | TimedOut | Busy):
                # Its memory or its driver is just being restarted.
                self._server.after(RETRY_SECONDS, again)
            else:
                self._fail(model, answer.error)

        def again() -> None:
            if self._scheduler == scheduler and model.loaded is loaded:
                self._host(model)

        self._server.call("scheduler.host", Host(model.spec.driver, loaded, model.identities), listener)

    def _unhost(self, model: Model) -> None:
        if self._scheduler and model.loaded is not None:
            message = Unhost(model.spec.driver, model.spec.name)
            self._server.call("scheduler.unhost", message, lambda _: None)

    # --- tokenizers ---

    def _read_tokenizer(self, model: Model) -> None:
        source, cache, dtype = model.source, self._cache, model.spec.dtype
        if source is None or model.tokenizer is not None:
            return

        def done(future: Future[tuple[tuple[ModelTokenizer, ChatTemplate], str]]) -> None:
            try:
                (model.tokenizer, model.template), model.fingerprint = future.result()
            except LLMOSError as error:
                self._fail(model, error)
            else:
                model.settle()

        self._background.run(lambda: (read_tokenizer(source, cache), fingerprint(source, dtype)), done)


def read_tokenizer(source: Path, cache: Path) -> tuple[ModelTokenizer, ChatTemplate]:
    """A model's tokenizer and chat template; InvalidArgument or IOFailure says what is wrong with them."""
    found = tokenizer.load(source, cache)
    _ = found.longest  # worked out here, off the service's thread
    return found, ChatTemplate(found.info.chat_template, bos=found.info.bos, eos=found.info.eos)


def find_source(spec: ModelSpec) -> Path | None:
    """Where a model's files are; None if they must be pulled first."""
    if not spec.source:
        return store.find(spec.name)
    path = Path(spec.source).expanduser().absolute()
    return path if path.exists() else None

"""The adapters of the models: loaded beside them from the manifest, and loaded and dropped while they run.

The scheduler is told last when one comes, and first when one goes: it refuses to lose one that a task needs,
so no sequence is ever started with an adapter that its driver does not have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from llmos.drivers.sdk.messages import LoadAdapter, LoadedAdapter, UnloadAdapter
from llmos.ipc import calls, codec
from llmos.ipc.background import Background
from llmos.ipc.errors import Busy, InvalidArgument, IOFailure, LLMOSError, NotFound
from llmos.ipc.server import Incoming, Server
from llmos.services.adapters import identity
from llmos.services.manifest import NAME
from llmos.services.models.fingerprint import fingerprint
from llmos.services.models.hosting import Adapter, Model
from llmos.services.scheduler.messages import Adapters as AdapterList

log = logging.getLogger("llmos.models")
LOAD_SECONDS = 600.0
DROP_SECONDS = 10.0
RETRY_SECONDS = 0.1

Told = Callable[[LLMOSError | None], None]


class Adapters:
    """What the loader does about adapters; ``background`` reads their files."""

    def __init__(self, server: Server, background: Background) -> None:
        self._server = server
        self._background = background

    def restore(self, model: Model, then: Callable[[], None]) -> None:
        """Load all that a model is to have onto its driver, which has none of them; one that cannot be loaded
        is listed with its error, and the others are served."""
        left, loaded = len(model.adapters), model.loaded

        def told(adapter: Adapter, error: LLMOSError | None) -> None:
            nonlocal left
            left -= 1
            adapter.error = error
            if error is not None:
                log.error("adapter %s of %s failed: %s", adapter.name, model.spec.name, error)
            if not left and model.loaded is loaded:
                then()

        for adapter in list(model.adapters.values()):
            self._load(model, adapter, lambda error, adapter=adapter: told(adapter, error))  # type: ignore[misc]
        if not left:
            then()

    def load(self, model: Model, name: str, source: str, call: Incoming) -> None:
        """Load one onto a model that is ready; the call is answered when requests can name it."""
        known = model.adapters.get(name)
        if not NAME.fullmatch(name):
            raise InvalidArgument(f"adapter name {name!r}: use up to 64 letters, digits, '-', '_' and '.'")
        if not source and known is None:
            raise InvalidArgument(f"say where the adapter {name!r} is: it is a folder as PEFT saves it")
        adapter = Adapter(name, Path(source).absolute() if source else known.source)  # type: ignore[union-attr]

        def told(error: LLMOSError | None) -> None:
            if error is not None:
                call.fail(error)
                return
            before, model.adapters[name] = model.adapters.get(name), adapter
            self._tell(model, lambda error: hosted(before, error))

        def hosted(before: Adapter | None, error: LLMOSError | None) -> None:
            unused, same = adapter, before is not None and before.identity == adapter.identity
            if error is None:
                log.info("%s has the adapter %s", model.spec.name, adapter.identity)
                unused = before or adapter
            elif before is not None:
                # Tasks run with the weights that had this name before.
                model.adapters[name] = before
            else:
                del model.adapters[name]

            def answer(_: LLMOSError | None) -> None:
                call.reply(model.adapter_line(adapter)) if error is None else call.fail(error)

            if same or unused.loaded is None or unused is model.adapters.get(name):
                answer(None)
            else:
                self._drop(model, unused.identity, answer)

        self._load(model, adapter, told)

    def unload(self, model: Model, name: str, call: Incoming) -> None:
        """Drop one that no task needs; the call is answered when its place is free."""
        adapter = model.adapters.get(name)
        if adapter is None:
            raise NotFound(f"{model.spec.name!r} has no adapter {name!r}")

        def hosted(error: LLMOSError | None) -> None:
            if error is not None:
                model.adapters[name] = adapter
                call.fail(error)
            elif adapter.loaded is None:
                call.reply(None)
            else:
                self._drop(model, adapter.identity, dropped)

        def dropped(error: LLMOSError | None) -> None:
            call.fail(error) if error is not None else call.reply(None)

        del model.adapters[name]
        self._tell(model, hosted)

    def _load(self, model: Model, adapter: Adapter, told: Told) -> None:
        """Name an adapter by its weights, and have the driver read it."""
        adapter.loaded, connection = None, model.loaded

        def answered(answer: calls.Answer) -> None:
            if answer.error is None:
                adapter.loaded = codec.decode(answer.body, LoadedAdapter)
            told(answer.error)

        def named(future: Future[str]) -> None:
            try:
                adapter.identity = identity(adapter.name, future.result())
            except LLMOSError as error:
                told(error)
                return
            if model.loaded is not connection:
                told(IOFailure(f"the driver of {model.spec.name!r} went down meanwhile: try again"))
                return
            request = LoadAdapter(model=model.spec.name, adapter=adapter.identity, source=str(adapter.source))
            target = f"driver.{model.spec.driver}.load_adapter"
            self._server.call(target, request, answered, timeout=LOAD_SECONDS)

        self._background.run(lambda: _fingerprint(adapter.source), named)

    def _tell(self, model: Model, told: Told) -> None:
        """Tell the scheduler which adapters tasks may have."""
        request = AdapterList(model.spec.name, model.identities)
        self._server.call("scheduler.adapters", request, lambda answer: told(answer.error))

    def _drop(self, model: Model, adapter: str, told: Told) -> None:
        """Have the driver drop an adapter, once the last slot that had it is emptied."""
        until = time.monotonic() + DROP_SECONDS

        def answered(answer: calls.Answer) -> None:
            if isinstance(answer.error, Busy) and time.monotonic() < until:
                self._server.after(RETRY_SECONDS, ask)
            else:
                told(answer.error)

        def ask() -> None:
            request = UnloadAdapter(model.spec.name, adapter)
            self._server.call(f"driver.{model.spec.driver}.unload_adapter", request, answered)

        ask()


def _fingerprint(source: Path) -> str:
    if not source.is_dir():
        raise NotFound(f"no adapter at {source}: it is a folder with adapter_config.json")
    return fingerprint(source, "lora")

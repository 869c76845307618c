"""The adapters of a driver's models: read beside the loop, and dropped when no sequence has them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from llmos.drivers.sdk.driver import Driver, FinishAdapter
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import LoadAdapter, LoadedAdapter, UnloadAdapter
from llmos.ipc.background import Background
from llmos.ipc.errors import Busy, Canceled, LLMOSError
from llmos.ipc.server import Incoming


class Adapters:
    """Answers the calls; used from the driver's thread, beside which ``background`` reads. ``check`` refuses
    a model whose weights are not on the device."""

    def __init__(
        self, driver: Driver, executor: Executor, background: Background, check: Callable[[str], None]
    ) -> None:
        self._driver = driver
        self._executor = executor
        self._background = background
        self._check = check
        self._loaded: dict[str, dict[str, LoadedAdapter]] = {}

    def load(self, request: LoadAdapter, call: Incoming) -> None:
        """What is loaded already is not loaded again."""
        known = self._loaded.setdefault(request.model, {})
        if request.adapter in known:
            call.reply(known[request.adapter])
            return
        self._check(request.model)

        def read(future: Future[FinishAdapter]) -> None:
            try:
                if self._loaded.get(request.model) is not known:
                    raise Canceled(f"model {request.model!r} was unloaded meanwhile")
                self._check(request.model)
                known[request.adapter] = future.result()()
                call.reply(known[request.adapter])
            except LLMOSError as error:
                call.fail(error)

        self._background.run(self._driver.load_adapter(request), read)

    def unload(self, request: UnloadAdapter) -> None:
        """Busy while a sequence has it, or a quantum that waits would start one."""
        if self._executor.starts_with(request.model, request.adapter):
            raise Busy(f"adapter {request.adapter} is in use: wait until its tasks have ended")
        self._driver.unload_adapter(request.model, request.adapter)
        self._loaded.get(request.model, {}).pop(request.adapter, None)

    def clear(self, model: str) -> None:
        """Whoever loaded them was started anew, and will load what is wanted: drop what is not used."""
        for adapter in list(self._loaded.get(model, ())):
            try:
                self.unload(UnloadAdapter(model, adapter))
            except Busy:
                continue

    def forget(self, model: str) -> None:
        """The model is gone, and its adapters with it."""
        self._loaded.pop(model, None)

"""The callbacks of the JAX driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from llmos.drivers.jax import platform
from llmos.drivers.sdk.driver import Driver, PendingMove, PendingStep, Progress
from llmos.drivers.sdk.messages import DriverInfo, LoadedModel, LoadRequest, Move, Quantum
from llmos.ipc.errors import InvalidArgument, NotFound

VERSION = "1"
FEATURES = ["chunked-prefill", "penalties", "logit-bias", "seeded-sampling", "prefix-pages", "moves"]


class JaxDriver(Driver):
    """Runs models on the devices that jax finds, or on those of ``platform`` ("cpu", "gpu", "tpu").

    ``execute`` is no generator itself: it checks the quantum and applies its release, start and grow before
    it returns the iterator over the steps, so a quantum that is preempted before its first step has still
    been applied.
    """

    def __init__(self, platform_name: str | None = None, attention: str = "auto") -> None:
        platform.prepare_process()
        self._platform = platform_name
        self._attention = attention
        self._found: list[Any] = []
        self._engines: dict[str, Any] = {}
        self._movers: dict[str, Any] = {}

    def describe(self) -> DriverInfo:
        return DriverInfo(
            driver="jax",
            version=VERSION,
            devices=[platform.describe_device(device) for device in self._devices()],
            dtypes=["float32", "bfloat16"],
            features=FEATURES,
        )

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        if request.model in self._engines:
            raise InvalidArgument(f"model {request.model} is loaded already; unload it first")
        from llmos.drivers.jax.loader import Load

        engine, loaded = Load(request, self._devices()[0], progress, self._attention).run()
        self._engines[request.model] = engine
        if loaded.host_pages or loaded.disk_pages:
            from llmos.drivers.jax.moves import open_mover

            self._movers[request.model] = open_mover(engine, loaded, self._devices()[0])
        return loaded

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        engine = self._engines.get(quantum.model)
        if engine is None:
            raise NotFound(f"model {quantum.model} is not loaded")
        steps: Iterator[PendingStep] = engine.execute(quantum)
        return steps

    def move(self, move: Move, key: bytes) -> PendingMove:
        pending: PendingMove = self._movers[move.model].move(move, key)
        return pending

    def reset(self, model: str) -> None:
        if model not in self._engines:
            raise NotFound(f"model {model} is not loaded")
        self._engines[model].reset()

    def unload(self, model: str) -> None:
        engine = self._engines.pop(model, None)
        if engine is None:
            raise NotFound(f"model {model} is not loaded")
        engine.close()
        if model in self._movers:
            self._movers.pop(model).close()

    def _devices(self) -> list[Any]:
        if not self._found:
            self._found = jax.devices(self._platform) if self._platform else jax.devices()
            platform.set_option("jax_default_device", self._found[0])
            if self._found[0].platform == "cpu":
                platform.keep_heap()
        return self._found

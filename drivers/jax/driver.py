"""The callbacks of the JAX driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from llmos.drivers.jax import platform
from llmos.drivers.sdk.driver import (
    Driver,
    Get,
    PendingAdapter,
    PendingEncoding,
    PendingMove,
    PendingStep,
    Progress,
    Put,
)
from llmos.drivers.sdk.messages import (
    DriverInfo,
    EncodeStep,
    LoadAdapter,
    LoadedModel,
    LoadRequest,
    Move,
    Quantum,
)
from llmos.ipc.errors import InvalidArgument, LLMOSError, NotFound, NotSupported

VERSION = "1"
FEATURES = [
    "encoders",
    "chunked-prefill",
    "penalties",
    "logit-bias",
    "seeded-sampling",
    "prefix-pages",
    "page-moves",
    "adapters",
    "parking",
]


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
        self._holes: list[Any] = []
        self._engines: dict[str, list[Any]] = {}
        self._movers: dict[str, list[Any]] = {}
        self._encoders: dict[str, Any] = {}
        self._pools: Any = None
        self._adapters: dict[str, Any] = {}
        self._parked: dict[str, Any] = {}

    def describe(self) -> DriverInfo:
        return DriverInfo(
            driver="jax",
            version=VERSION,
            devices=[platform.describe_device(device) for device in self._devices()],
            dtypes=["float32", "bfloat16", "int8", "float8"],
            features=FEATURES,
        )

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        if request.model in self._engines or request.model in self._encoders:
            raise InvalidArgument(f"model {request.model} is loaded already; unload it first")
        from llmos.drivers.jax.encoders.loader import EncoderLoad, is_encoder
        from llmos.drivers.jax.paging.pool import Pools

        if is_encoder(request.source):
            encoder, loaded = EncoderLoad(request, self._devices(), progress).run()
            self._encoders[request.model] = encoder
            return loaded
        self._pools = self._pools or Pools()
        try:
            with platform.lacking("the device has not got the memory to load this model"):
                return self._load_decoder(request, progress)
        finally:
            self._pools.keep(self._engines)

    def _load_decoder(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        from llmos.drivers.jax.adapters.adapting import Adapters
        from llmos.drivers.jax.loading.loader import Load
        from llmos.drivers.jax.paging.moves import open_movers

        engines, loaded = Load(request, self._devices(), progress, self._attention, self._pools).run()
        try:
            self._movers[request.model] = open_movers(engines, loaded)
        except LLMOSError:
            for engine in engines:
                engine.close()
            raise
        self._engines[request.model] = engines
        self._adapters[request.model] = Adapters(engines, loaded.adapters)
        return loaded

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        engines = self._engines.get(quantum.model)
        if engines is None:
            raise NotFound(f"model {quantum.model} is not loaded")
        if not 0 <= quantum.replica < len(engines):
            raise InvalidArgument(
                f"model {quantum.model} has no replica {quantum.replica}, only {len(engines)}"
            )
        steps: Iterator[PendingStep] = engines[quantum.replica].execute(quantum)
        return steps

    def move(self, move: Move, key: bytes) -> PendingMove:
        pending: PendingMove = self._mover(move.model, move.replica).move(move, key)
        return pending

    def save(self, model: str, replica: int, pages: list[int], put: Put) -> PendingMove:
        pending: PendingMove = self._mover(model, replica).save(pages, put)
        return pending

    def restore(self, model: str, replica: int, pages: list[int], get: Get) -> PendingMove:
        pending: PendingMove = self._mover(model, replica).restore(pages, get)
        return pending

    def idle(self) -> bool:
        engines = [engine for engines in self._engines.values() for engine in engines]
        # Replicas come equally far: their work is the same.
        engines.sort(key=lambda engine: len(engine.unrehearsed), reverse=True)
        return any(engine.rehearse() for engine in engines)

    def encode(self, request: EncodeStep) -> PendingEncoding:
        encoder = self._encoders.get(request.model)
        if encoder is None:
            raise NotFound(f"encoder {request.model} is not loaded")
        pending: PendingEncoding = encoder.encode(request)
        return pending

    def load_adapter(self, request: LoadAdapter) -> PendingAdapter:
        pending: PendingAdapter = self._adapting(request.model).load(request)
        return pending

    def unload_adapter(self, model: str, adapter: str) -> None:
        self._adapting(model).unload(adapter)

    def reset(self, model: str, replica: int = -1) -> None:
        if model not in self._engines:
            raise NotFound(f"model {model} is not loaded")
        for number, engine in enumerate(self._engines[model]):
            if replica in (-1, number):
                engine.replica.reset()

    def park(self, model: str) -> PendingMove:
        from llmos.drivers.jax.parking import Parked

        replicas = [engine.replica for engine in self._engines.get(model, [])]
        replicas += [self._encoders[model]] if model in self._encoders else []
        if not replicas:
            raise NotFound(f"model {model} is not loaded")
        self._parked[model] = Parked(replicas, self._devices()[0])
        pending: PendingMove = self._parked[model].park()
        return pending

    def wake(self, model: str) -> PendingMove:
        if model not in self._parked:
            raise NotFound(f"model {model} is not parked")
        pending: PendingMove = self._parked[model].wake()
        return pending

    def unload(self, model: str) -> None:
        self._parked.pop(model, None)
        engines = self._engines.pop(model, None)
        if engines is None and model in self._encoders:
            engines = [self._encoders.pop(model)]
        if engines is None:
            raise NotFound(f"model {model} is not loaded")
        for engine in engines:
            engine.close()
        self._adapters.pop(model, None)
        for mover in self._movers.pop(model, []):
            mover.close()
        if self._pools is not None:
            self._pools.keep(self._engines)

    def _adapting(self, model: str) -> Any:
        if model not in self._adapters:
            raise NotFound(f"no decoder {model} is loaded here")
        return self._adapters[model]

    def _mover(self, model: str, replica: int) -> Any:
        movers = self._movers[model]
        if not movers:
            raise NotSupported("the pages of a model that is cut over several devices stay where they are")
        return movers[replica]

    def _devices(self) -> list[Any]:
        if not self._found:
            self._found = jax.devices(self._platform) if self._platform else jax.devices()
            platform.set_option("jax_default_device", self._found[0])
            if self._found[0].platform == "cpu":
                platform.keep_heap()
            if self._found[0].platform in ("gpu", "cuda"):
                self._holes = [hole for device in self._found for hole in platform.keep_holes(device)]
        return self._found

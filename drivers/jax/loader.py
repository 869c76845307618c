"""Loading a model: find the weights, size the cache, compile ahead, and put an engine together.

Restoring or converting the weights runs beside compiling, for compiling needs only their shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax import attention, buckets, families, pages, platform, rope, state
from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.engine import Engine
from llmos.drivers.jax.forward import Shape
from llmos.drivers.jax.ledger import Limits
from llmos.drivers.jax.modules import Decoder, abstract, struct
from llmos.drivers.jax.programs import HEARTBEAT_S, Programs, Spec
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.random import PREFIX, RandomSource, fill
from llmos.drivers.jax.weights.source import Source, open_source
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadedModel, LoadProgress, LoadRequest
from llmos.drivers.sdk.sizes import with_tiers
from llmos.ipc.errors import InvalidArgument, NoMemory, NotFound

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_TABLE_MULTIPLE = 16
_FIRST_ON_CPU = 7
_HOST_CACHE_BYTES = 512 << 20


@dataclass
class Plan:
    """What to load and from where: a kept checkpoint if ``kept``, else ``source``."""

    family: families.Family
    config: DecoderConfig
    folder: Path | None
    kept: bool
    source: Source | None


@dataclass
class Load:
    """One load in progress; ``phases`` collects seconds by phase."""

    request: LoadRequest
    device: Any
    report: Progress
    attention: str = "auto"
    phases: dict[str, float] = field(default_factory=dict)
    _latest: LoadProgress = field(default_factory=lambda: LoadProgress("read", 0, 0))

    def run(self) -> tuple[Engine, LoadedModel]:
        """Load everything; InvalidArgument names what is wrong with the model or the request."""
        request = self.request
        check_request(request)
        self.report(self._latest)
        if request.cache:
            platform.keep_programs(str(Path(request.cache) / "programs"))
        plan = self._timed("read", lambda: find_weights(request))
        self.request = request = with_tiers(
            request, page_size(plan.config, request), device_is_ram=self.device.platform == "cpu"
        )
        config = rope.for_context(plan.config, request.max_context)
        graph, tree, shapes = parameters(config, DTYPES[request.dtype], self.device)
        weight_bytes = sum(prod(x.shape) * x.dtype.itemsize for x in shapes.values())
        limits, width = self._limits(plan.config, weight_bytes)
        backend = attention.select(self.attention, self.device.platform, plan.config, request)
        shape = Shape(
            graph=graph,
            tree=tree,
            backend=backend,
            page_tokens=limits.page_tokens,
            pages=limits.pages + 1,
        )
        make = self._makers(plan.config, shape, limits, width)
        programs = Programs(self._spec(shape, list(shapes.values()), make, limits))
        with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
            placing = pool.submit(self._timed, "place", lambda: _placed((make[0](), make[1]())))
            loading = pool.submit(self._weights, plan, shapes)
            self._timed("compile", lambda: programs.compile_ahead(self._compiling(loading)))
            weights = self._timed("wait", lambda: self._attend(loading))
            caches, batch = self._attend(placing)
        engine = Engine(limits, programs, [weights[path] for path in shapes], caches, batch)
        return engine, self._loaded(plan, limits, weight_bytes, shapes, backend.name)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        self.phases[phase] = time.perf_counter() - begun
        return result

    def _note(self, phase: Any) -> Callable[[int, int], None]:
        def note(done: int, total: int) -> None:
            self._latest = LoadProgress(phase, done, total)

        return note

    def _compiling(self, loading: Future[Any]) -> Callable[[int, int], None]:
        """Report compiling, and stop it when the weights turn out to be bad."""

        def report(done: int, total: int) -> None:
            if loading.done():
                loading.result()
            self.report(LoadProgress("compile", done, total))

        return report

    def _attend(self, loading: Future[Any]) -> Any:
        while True:
            try:
                return loading.result(timeout=HEARTBEAT_S)
            except TimeoutError:
                self.report(self._latest)

    def _weights(self, plan: Plan, shapes: dict[str, Any]) -> dict[str, jax.Array]:
        if plan.kept and plan.folder:
            try:
                folder = plan.folder
                self._note("restore")(0, 0)
                return dict(self._timed("restore", lambda: checkpoint.restore(folder, shapes)))
            except InvalidArgument as damage:
                if checkpoint.is_checkpoint(self.request.source):
                    raise
                checkpoint.discard(folder, damage.message)
        source = plan.source or open_source(self.request.source)
        if isinstance(source, RandomSource):
            return dict(self._timed("place", lambda: _placed(fill(shapes))))
        place = lambda path, value: jax.device_put(value, shapes[path].sharding)  # noqa: E731
        arguments = (source, plan.family, plan.config, shapes, place, self._note("convert"))
        weights = self._timed("convert", lambda: convert(*arguments))
        if plan.folder:
            target = plan.folder
            self._note("save")(0, 0)
            save = lambda: checkpoint.save(target, plan.family.name, plan.config, weights)  # noqa: E731
            self._timed("save", save)
        return dict(weights)

    def _limits(self, config: DecoderConfig, weight_bytes: int) -> tuple[Limits, int]:
        request = self.request
        context = min(request.max_context, config.max_positions)
        needed = -(-context // request.page_tokens)
        free = platform.free_memory(self.device) * request.memory_fraction - weight_bytes
        page_bytes = page_size(config, request)
        pages = request.pages or int(free // page_bytes)
        if not request.pages and self.device.platform == "cpu":
            pages = min(pages, request.slots * needed, max(_HOST_CACHE_BYTES // page_bytes, needed))
        if pages < needed or (free and pages * page_bytes > free / request.memory_fraction):
            raise NoMemory(
                f"{pages} pages of {page_bytes} bytes do not fit or hold less than one context of {context}; "
                "lower max_context or pages, or raise memory_fraction"
            )
        limits = Limits(
            slots=request.slots,
            pages=pages,
            page_tokens=request.page_tokens,
            max_context=context,
            chunk_tokens=min(request.chunk_tokens, context),
            vocab_size=config.vocab_size,
        )
        return limits, -(-needed // _TABLE_MULTIPLE) * _TABLE_MULTIPLE

    def _makers(
        self, config: DecoderConfig, shape: Shape, limits: Limits, width: int
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Functions that make the caches and the batch state; also evaluated for their shapes alone."""
        kv = DTYPES[self.request.kv_dtype]
        caches = lambda: shape.backend.allocate(config, shape.pages, limits.page_tokens, kv)  # noqa: E731
        return caches, lambda: state.empty_state(limits.slots, width, limits.pages)

    def _spec(self, shape: Shape, weights: Any, make: Any, limits: Limits) -> Spec:
        # Padding a chunk to four times its length is cheaper on a CPU than compiling, and dear elsewhere.
        on_cpu = self.device.platform == "cpu"
        caches = jax.eval_shape(make[0])
        tiers = self.request.host_pages or self.request.disk_pages
        return Spec(
            shape=shape,
            weights=weights,
            caches=caches,
            batch=jax.eval_shape(make[1]),
            vocab=limits.vocab_size,
            max_context=limits.max_context,
            decode_sizes=self._decode_sizes(limits.slots),
            chunk_sizes=buckets.chunk_buckets(limits.chunk_tokens)
            if on_cpu
            else buckets.doubling_buckets(limits.chunk_tokens),
            prefill_rows=[1] if on_cpu else [1, 2, 4, 8, 16],
            # A person at a laptop waits for the first token; a server is ready when it runs at full speed.
            first=_FIRST_ON_CPU if on_cpu else 1 << 30,
            move_sizes=pages.block_sizes(caches) if tiers else (),
        )

    def _decode_sizes(self, slots: int) -> list[int]:
        """Batch sizes to compile: few on a CPU, where compiling is slow and padding rows are cheap.

        XLA:CPU converts a whole bfloat16 matrix for a product with one row, and not for two.
        """
        if self.device.platform != "cpu":
            return buckets.decode_buckets(slots, factor=2)
        return buckets.decode_buckets(slots, smallest=2 if self.request.dtype == "bfloat16" else 1)

    def _loaded(
        self, plan: Plan, limits: Limits, weight_bytes: int, shapes: dict[str, Any], backend: str
    ) -> LoadedModel:
        return LoadedModel(
            model=self.request.model,
            family=plan.family.name,
            parameters=sum(prod(x.shape) for x in shapes.values()),
            weight_bytes=weight_bytes,
            pages=limits.pages,
            page_tokens=limits.page_tokens,
            page_bytes=page_size(plan.config, self.request),
            slots=limits.slots,
            max_context=limits.max_context,
            chunk_tokens=limits.chunk_tokens,
            vocab_size=limits.vocab_size,
            stop_tokens=list(plan.config.stop_tokens),
            attention=backend,
            host_pages=self.request.host_pages,
            disk_pages=self.request.disk_pages,
            phases={name: round(seconds, 3) for name, seconds in self.phases.items()},
        )


def check_request(request: LoadRequest) -> None:
    """Refuse what this driver cannot do, before anything is read."""
    for name in ("dtype", "kv_dtype"):
        if getattr(request, name) not in DTYPES:
            raise InvalidArgument(f"{name} {getattr(request, name)} is not one of {', '.join(DTYPES)}")
    if prod(request.mesh.values()) != 1:
        raise InvalidArgument("this driver runs a model on one device: leave mesh empty")
    ranges = {"page_tokens": (1, 1024), "slots": (1, 4096), "chunk_tokens": (1, 65536), "pages": (0, 1 << 24)}
    ranges |= {"host_pages": (0, 1 << 28), "disk_pages": (0, 1 << 28)}
    ranges |= {"host_bytes": (-1, 1 << 50), "disk_bytes": (0, 1 << 50)}
    for name, (low, high) in {**ranges, "max_context": (2, 1 << 22)}.items():
        if not low <= getattr(request, name) <= high:
            raise InvalidArgument(f"{name} is {getattr(request, name)}, not in {low}..{high}")
    if not 0.0 < request.memory_fraction <= 1.0:
        raise InvalidArgument(f"memory_fraction is {request.memory_fraction}, not in 0..1")


def find_weights(request: LoadRequest) -> Plan:
    """A kept checkpoint of the source where there is one, else the source itself."""
    if checkpoint.is_checkpoint(request.source):
        return _kept(Path(request.source), request.dtype)
    folder = None
    if request.source.startswith(PREFIX):
        made = open_source(request.source)
        family = families.find(made)
        return Plan(family, family.configure[made.format](made), folder, False, made)
    if not Path(request.source).exists():
        raise NotFound(f"no model at {request.source}")
    if request.cache:
        folder = Path(request.cache) / "weights" / checkpoint.key_of(request.source, request.dtype)
        try:
            if checkpoint.is_checkpoint(str(folder)):
                return _kept(folder, request.dtype)
        except InvalidArgument as damage:
            checkpoint.discard(folder, damage.message)
    source = open_source(request.source)
    family = families.find(source)
    return Plan(family, family.configure[source.format](source), folder, False, source)


def _kept(folder: Path, dtype: str) -> Plan:
    name, config, shapes = checkpoint.read_manifest(folder)
    if any(x.dtype != DTYPES[dtype] for x in shapes.values()):
        raise InvalidArgument(f"the checkpoint {folder} is not in {dtype}")
    return Plan(families.by_name(name), config, folder, True, None)


def _placed(tree: Any) -> Any:
    return jax.block_until_ready(tree)  # type: ignore[no-untyped-call]


def page_size(config: DecoderConfig, request: LoadRequest) -> int:
    """Bytes of one page over all layers, keys and values."""
    token: int = 2 * config.layers * config.kv_size * jnp.dtype(DTYPES[request.kv_dtype]).itemsize
    return request.page_tokens * token


def parameters(config: DecoderConfig, dtype: Any, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The decoder's graph, its state's tree, and the parameters' shapes by dotted path, in that order."""
    graph, tree = nnx.split(Decoder(config, abstract(dtype)))
    placed = jax.sharding.SingleDeviceSharding(device)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(tree)}
    shapes = {path: struct(leaf.shape, leaf.dtype, placed) for path, leaf in leaves.items()}
    return graph, jax.tree.structure(tree), shapes

"""Loading a model: find the weights, size the cache, compile ahead, and put an engine together.

Restoring or converting the weights runs beside compiling, for compiling needs only their shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx

from llmos.drivers.jax import (
    adapters,
    attention,
    buckets,
    families,
    pages,
    platform,
    quant,
    rope,
    sharing,
    state,
    verification,
)
from llmos.drivers.jax.attention import AttentionBackend
from llmos.drivers.jax.attention.shared import SharedAttention
from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.drafts import Draft, check_draft
from llmos.drivers.jax.engine import Engine
from llmos.drivers.jax.forward import Shape
from llmos.drivers.jax.ledger import Limits
from llmos.drivers.jax.modules import Decoder, abstract, struct
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.pipeline.parts import Pipeline
from llmos.drivers.jax.pool import Own, Pools, Share
from llmos.drivers.jax.programs import HEARTBEAT_S, Programs, Spec, Speculating
from llmos.drivers.jax.sharding import mesh, stages
from llmos.drivers.jax.sharding.placement import OneDevice, Placement
from llmos.drivers.jax.sharing import HOST_CACHE_BYTES, Member
from llmos.drivers.jax.speculating import Speculation
from llmos.drivers.jax.speculation import Policy
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.random import PREFIX, RandomSource, fill
from llmos.drivers.jax.weights.source import Source, open_source
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadedModel, LoadProgress, LoadRequest, Precision
from llmos.drivers.sdk.sizes import with_tiers
from llmos.ipc import paths
from llmos.ipc.errors import InvalidArgument, NoMemory, NotFound

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KV_DTYPES = {**DTYPES, **quant.DTYPES}
FLOAT8_CAPABILITY = (8, 9)
_TABLE_MULTIPLE = 16
_FIRST_ON_CPU = 7
# Guesses of a step, and tokens verified in a step over all its rows: elsewhere, and on a CPU, where a few
# rows already take longer than one.
_GUESSES = (7, 3)
_VERIFIED = (256, 32)


@dataclass
class Plan:
    """What to load and from where: a kept checkpoint if ``kept``, else ``source``."""

    family: families.Family
    config: DecoderConfig
    folder: Path | None
    kept: bool
    source: Source | None


@dataclass
class Parts:
    """What one replica is made of, but for the weights: ``kept`` and ``shapes`` are those of the parameters
    as they are loaded and as programs take them; ``make`` allocates the caches and the batch."""

    place: Placement
    limits: Limits
    kept: dict[str, Any]
    shapes: dict[str, Any]
    programs: Programs
    make: Callable[[], tuple[Own | Share, state.BatchState]]
    draft: Draft | None
    member: Member | None

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loaded parameters as programs take them; what changes is given up."""
        return self.place.arrange(config, weights)

    def engine(self, weights: dict[str, jax.Array], caches: Own | Share, batch: state.BatchState) -> Engine:
        """An engine of this replica."""
        ordered = [weights[path] for path in self.shapes]
        common, speculation = self.place.common, self._speculation()
        engine = Engine(self.limits, self.programs, ordered, caches, batch, common, speculation=speculation)
        if self.place.device.platform != "cpu":
            engine.unrehearsed = self.programs.ahead()
        return engine

    def _speculation(self) -> Speculation | None:
        speculating = self.programs.spec.speculating
        if speculating is None:
            return None
        empty = verification.empty_history(self.limits.slots, self.limits.max_context)
        history = jax.device_put(empty, self.place.common)
        policy = Policy(speculating.tokens, speculating.sizes, blind=self.draft is not None)
        draft = self.draft.held(self.limits) if self.draft is not None else None
        return Speculation(self.programs, policy, history, draft)


@dataclass
class Load:
    """One load in progress onto some of the ``devices``; ``phases`` collects seconds by phase."""

    request: LoadRequest
    devices: list[Any]
    report: Progress
    attention: str = "auto"
    pools: Pools = field(default_factory=Pools)
    phases: dict[str, float] = field(default_factory=dict)
    _native: bool = False
    _latest: LoadProgress = field(default_factory=lambda: LoadProgress("read", 0, 0))

    def run(self) -> tuple[list[Engine], LoadedModel]:
        """Load everything: an engine for each replica; InvalidArgument names what is wrong with the model or
        the request."""
        request = self.request
        check_request(request)
        adapters.check(request)
        axes = mesh.parse(request.mesh)
        mesh.check_devices(axes, len(self.devices))
        wanted = max(request.host_pages, request.disk_pages, request.host_bytes, request.disk_bytes)
        if wanted > 0 and any(size > 1 for axis, size in request.mesh.items() if axis != "data"):
            raise InvalidArgument(
                "pages of a model that is cut over several devices cannot leave them: "
                "leave host_pages and disk_pages 0, or use the data axis only"
            )
        if axes.pipeline > 1:
            self.request = request = unguessed(request)
        check_device(request, self.devices[0])
        self.report(self._latest)
        if request.cache:
            platform.keep_programs(str(Path(request.cache) / "programs"))
        plan = self._timed("read", lambda: find_weights(request))
        # Pages that are cut over several devices stay there, also where the tiers' sizes are left to us.
        cut = any(size > 1 for axis, size in request.mesh.items() if axis != "data")
        no_tiers = cut or self.devices[0].platform == "cpu"
        page_bytes = page_size(plan.config, request) * request.mesh.get("data", 1)
        self.request = request = with_tiers(request, page_bytes, no_host=no_tiers)
        mesh.check_model(axes, plan.config)
        first, *others = stages.places(self.devices, axes, plan.config)
        parts = self._parts(plan, first)
        with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
            placing = pool.submit(self._timed, "place", parts.make)
            loading = pool.submit(self._weights, plan, parts)
            self._timed("compile", lambda: parts.programs.compile_ahead(self._compiling(loading)))
            weights = self._timed("wait", lambda: self._attend(loading))
            engines = [parts.engine(weights, *self._attend(placing))]
        if others:
            # Replicas are alike to the scheduler, whatever is free on their devices.
            self.request = msgspec.structs.replace(request, pages=parts.limits.pages)
            copies = lambda: [self._replica(plan, each, weights) for each in others]  # noqa: E731
            engines += self._timed("replicate", copies)
        return engines, self._loaded(plan, parts, len(engines))

    def _parts(self, plan: Plan, places: list[Placement]) -> Parts | Pipeline:
        """One replica's sizes and programs; nothing is on its devices yet."""
        made = [self._stage(plan, place) for place in places]
        if len(made) == 1:
            return made[0]
        pages = [part.limits.pages for part in made]
        if len(set(pages)) > 1:
            # Block tables are the same in all stages, so the one with the least room decides.
            self.request = msgspec.structs.replace(self.request, pages=min(pages))
            made = [self._stage(plan, place) for place in places]
        return Pipeline.join(made, struct((plan.config.hidden,), DTYPES[self.request.dtype]))

    def _stage(self, plan: Plan, place: Placement) -> Parts:
        """As ``_parts``, of one pipeline stage of a replica, or of all of it."""
        request = self.request
        config = rope.for_context(plan.config, request.max_context)
        stacks = (request.adapters, request.adapter_rank)
        graph, tree, whole = parameters(config, DTYPES[request.dtype], place, request.weights, stacks)
        kept = {path: x for path, x in whole.items() if not adapters.is_stack(path)}
        shapes = place.arranged(config, whole)
        self._native = self._timed("kernels", lambda: self._kernels(place))
        draft = self._draft(plan.config, place)
        member = self._member(plan.config, place, shapes)
        limits, width = self._limits(plan.config, place, shapes, draft, member)
        backend = self._backend(plan.config, place)
        if member is not None:
            backend = SharedAttention(backend, member.geometry)
        shape = Shape(
            graph=graph,
            tree=tree,
            backend=backend,
            page_tokens=limits.page_tokens,
            pages=limits.pages + (member.geometry.slab_pages if member is not None else 1),
            native=self._native,
            adapters=request.adapters > 0,
        )
        kv = member.pool.dtype if member is not None else KV_DTYPES[request.kv_dtype]
        allocate = lambda config: backend.allocate(config, shape.pages, limits.page_tokens, kv)  # noqa: E731
        batch = lambda: state.empty_state(limits.slots, width, limits.pages, shape.adapters)  # noqa: E731
        cache_shapes, caches = place.caches(allocate, plan.config)
        spec = self._spec(shape, place, list(shapes.values()), cache_shapes, jax.eval_shape(batch), limits)
        speculating = self._speculating(limits, draft, spec.decode_sizes)
        room = adapters.room(config, request, list(shapes), DTYPES[request.dtype])
        spec = replace(spec, speculating=speculating, room=room)
        hold = member.caches if member is not None else lambda: Own(_placed(caches()))
        make = lambda: (hold(), _placed(jax.jit(batch, out_shardings=place.common)()))  # noqa: E731
        return Parts(place, limits, kept, shapes, Programs(spec), make, draft, member)

    def _member(self, config: DecoderConfig, place: Placement, shapes: dict[str, Any]) -> Member | None:
        if self.request.arena == "own":
            return None
        weights = sum(_bytes_on_one(x) for x in shapes.values())
        return sharing.join(self.pools, self.request, config, place.device, weights)

    def _draft(self, config: DecoderConfig, place: Placement) -> Draft | None:
        """The draft model, if there is to be one; refused if it cannot guess for a model of ``config``."""
        request = self.request
        if request.speculation not in ("auto", "draft") or not request.draft:
            return None
        own = msgspec.structs.replace(request, source=request.draft)
        plan = find_weights(own)
        check_draft(plan.config, config, request.max_context)
        mesh.check_model(mesh.parse(request.mesh), plan.config)
        turned = rope.for_context(plan.config, request.max_context)
        graph, tree, kept = parameters(turned, DTYPES[request.dtype], place, request.weights)
        backend = self._backend(plan.config, place)
        loader = Load(own, self.devices, self.report, self.attention)
        load = lambda: place.arrange(plan.config, loader._kept_weights(plan, kept))  # noqa: E731
        shapes = place.arranged(turned, kept)
        kv = KV_DTYPES[request.kv_dtype]
        return Draft(place, plan.config, graph, tree, backend, shapes, load, kv, self._native)

    def _backend(self, config: DecoderConfig, place: Placement) -> AttentionBackend:
        local, device = place.local(config), place.device.platform
        # The TPU's kernel wants keys and values of a token side by side, which a pool has not.
        name = "xla" if device == "tpu" and self.request.arena == "shared" else self.attention
        return place.attention(attention.select(name, device, local, self.request, self._native))

    def _replica(self, plan: Plan, places: list[Placement], weights: dict[str, jax.Array]) -> Engine:
        """Another replica, with a copy of the first one's weights."""
        parts = self._parts(plan, places)
        parts.programs.compile_ahead(self._compiling(None))
        own = {path: jax.device_put(weights[path], x.sharding) for path, x in parts.shapes.items()}
        return parts.engine(_placed(own), *parts.make())

    def _kernels(self, place: Placement) -> bool:
        """Whether this model runs on the CPU's own kernels, which know one device only."""
        if place.device.platform != "cpu" or not isinstance(place, OneDevice) or self.attention == "xla":
            return False
        cache = Path(self.request.cache) if self.request.cache else paths.cache_dir()
        return kernels.enable(cache / "native")

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        self.phases[phase] = time.perf_counter() - begun
        return result

    def _note(self, phase: Any) -> Callable[[int, int], None]:
        def note(done: int, total: int) -> None:
            self._latest = LoadProgress(phase, done, total)

        return note

    def _compiling(self, loading: Future[Any] | None) -> Callable[[int, int], None]:
        """Report compiling, and stop it when the weights turn out to be bad."""

        def report(done: int, total: int) -> None:
            if loading is not None and loading.done():
                loading.result()
            self.report(LoadProgress("compile", done, total))

        return report

    def _attend(self, loading: Future[Any]) -> Any:
        while True:
            try:
                return loading.result(timeout=HEARTBEAT_S)
            except TimeoutError:
                self.report(self._latest)

    def _weights(self, plan: Plan, parts: Parts | Pipeline) -> dict[str, jax.Array]:
        """Parameters as programs take them."""
        weights = parts.arrange(plan.config, self._kept_weights(plan, parts.kept))
        return weights | adapters.empty(parts.shapes)

    def _kept_weights(self, plan: Plan, shapes: dict[str, Any]) -> dict[str, jax.Array]:
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

    def _limits(
        self,
        config: DecoderConfig,
        place: Placement,
        shapes: dict[str, Any],
        draft: Draft | None,
        member: Member | None,
    ) -> tuple[Limits, int]:
        """Sizes of a replica whose parameters are ``shapes``, and the width of its block tables."""
        request, device = self.request, place.device
        context = min(request.max_context, config.max_positions)
        needed = -(-context // request.page_tokens)
        weights, configs = list(shapes.values()), [config]
        if draft is not None:
            weights, configs = weights + list(draft.shapes.values()), [config, draft.config]
        weight_bytes = sum(_bytes_on_one(x) for x in weights)
        free = platform.free_memory(device) * request.memory_fraction - weight_bytes
        page_bytes = sum(page_size(place.local(each), request) for each in configs) / place.page_parts
        pages = request.pages or int(free // page_bytes)
        if not request.pages and device.platform == "cpu":
            pages = min(pages, request.slots * needed, max(int(HOST_CACHE_BYTES // page_bytes), needed))
        fits = not free or pages * page_bytes <= free / request.memory_fraction
        if member is not None:
            pages, fits = member.pages, True
        if pages < needed or not fits:
            raise NoMemory(
                f"{pages} pages of {page_bytes:.0f} bytes do not fit or hold less than one context of "
                f"{context}; lower max_context or pages, or raise memory_fraction or arena_bytes"
            )
        limits = Limits(
            slots=request.slots,
            pages=pages,
            page_tokens=request.page_tokens,
            max_context=context,
            chunk_tokens=min(request.chunk_tokens, request.slots * context),
            vocab_size=config.vocab_size,
            overtaking=request.speculation != "off",
        )
        return limits, -(-needed // _TABLE_MULTIPLE) * _TABLE_MULTIPLE

    def _spec(
        self, shape: Shape, place: Placement, weights: Any, caches: Any, batch: Any, limits: Limits
    ) -> Spec:
        # Padding a chunk to four times its length is cheaper on a CPU than compiling, and dear elsewhere.
        on_cpu = place.device.platform == "cpu"
        tiers = self.request.host_pages or self.request.disk_pages
        # Pipeline stages work on as many parts of a step.
        slots, chunk = (-(-size // place.stages) for size in (limits.slots, limits.chunk_tokens))
        longest = min(chunk, limits.max_context)
        return Spec(
            shape=shape,
            place=place,
            weights=weights,
            caches=caches,
            batch=batch,
            vocab=limits.vocab_size,
            max_context=limits.max_context,
            decode_sizes=self._decode_sizes(slots, on_cpu),
            chunk_tokens=chunk,
            chunk_sizes=buckets.chunk_buckets(longest) if on_cpu else buckets.doubling_buckets(longest),
            prefill_rows=[1] if on_cpu else [1, 2, 4, 8, 16],
            # A person at a laptop waits for the first token; a server is ready when it runs at full speed.
            first=_FIRST_ON_CPU if on_cpu else 1 << 30,
            move_sizes=pages.block_sizes(caches) if tiers else (),
        )

    def _speculating(self, limits: Limits, draft: Draft | None, sizes: list[int]) -> Speculating | None:
        if self.request.speculation == "off":
            return None
        on_cpu = self.devices[0].platform == "cpu"
        tokens = self.request.speculation_tokens or _GUESSES[on_cpu]
        rows = _VERIFIED[on_cpu] // (tokens + 1)
        history = jax.eval_shape(lambda: verification.empty_history(limits.slots, limits.max_context))
        small = [size for size in sizes if size <= rows] or sizes[:1]
        return Speculating(tokens, small, history, draft.described(limits) if draft is not None else None)

    def _decode_sizes(self, slots: int, on_cpu: bool) -> list[int]:
        """Batch sizes to compile: few on a CPU, where compiling is slow and padding rows are cheap.

        They are cheap up to four rows in the native kernel; XLA:CPU converts a whole bfloat16 matrix for a
        product with one row, and not for two.
        """
        if not on_cpu:
            return buckets.decode_buckets(slots, factor=2)
        if self._native:
            return [size for size in buckets.decode_buckets(slots, factor=2) if size != 2 or slots == 2]
        return buckets.decode_buckets(slots, smallest=2 if self.request.dtype == "bfloat16" else 1)

    def _loaded(self, plan: Plan, parts: Parts | Pipeline, replicas: int) -> LoadedModel:
        limits = parts.limits
        return LoadedModel(
            model=self.request.model,
            family=plan.family.name,
            parameters=sum(
                prod(parts.kept[x].shape) for x in parts.kept.keys() - quant.scale_paths(parts.kept)
            ),
            weight_bytes=sum(prod(x.shape) * x.dtype.itemsize for x in parts.kept.values()),
            pages=limits.pages,
            page_tokens=limits.page_tokens,
            page_bytes=page_size(plan.config, self.request),
            slots=limits.slots,
            max_context=limits.max_context,
            chunk_tokens=limits.chunk_tokens,
            vocab_size=limits.vocab_size,
            stop_tokens=list(plan.config.stop_tokens),
            attention=parts.programs.spec.shape.backend.name,
            host_pages=self.request.host_pages,
            disk_pages=self.request.disk_pages,
            replicas=replicas,
            adapters=self.request.adapters,
            phases={name: round(seconds, 3) for name, seconds in self.phases.items()},
            **(parts.member.described() if parts.member is not None else {}),
        )


def check_request(request: LoadRequest) -> None:
    """Refuse what this driver cannot do, before anything is read."""
    sharing.check_request(request)
    if request.dtype not in DTYPES:
        raise InvalidArgument(
            f"dtype {request.dtype} is not one of {', '.join(DTYPES)}: it is what is computed in; "
            f'ask for 8-bit weights by weights = "{request.dtype}"'
        )
    ranges = {"page_tokens": (1, 1024), "slots": (1, 4096), "chunk_tokens": (1, 65536), "pages": (0, 1 << 24)}
    ranges |= {"host_pages": (0, 1 << 28), "disk_pages": (0, 1 << 28)}
    ranges |= {"host_bytes": (-1, 1 << 50), "disk_bytes": (0, 1 << 50)}
    for name, (low, high) in {**ranges, "max_context": (2, 1 << 22)}.items():
        if not low <= getattr(request, name) <= high:
            raise InvalidArgument(f"{name} is {getattr(request, name)}, not in {low}..{high}")
    if request.speculation == "draft" and not request.draft:
        raise InvalidArgument("speculation by a draft model needs one: set draft to its source")
    if not 0 <= request.speculation_tokens <= 32:
        raise InvalidArgument(f"speculation_tokens is {request.speculation_tokens}, not in 0..32")
    if not 0.0 < request.memory_fraction <= 1.0:
        raise InvalidArgument(f"memory_fraction is {request.memory_fraction}, not in 0..1")


def unguessed(request: LoadRequest) -> LoadRequest:
    """The request for a model in pipeline stages, which do not guess; refused if guesses were asked for."""
    if request.speculation in ("ngram", "draft"):
        raise InvalidArgument(
            f'a model in pipeline stages does not speculate: set speculation = "off" instead of '
            f'"{request.speculation}", or use another axis of the mesh'
        )
    return msgspec.structs.replace(request, speculation="off", draft="")


def check_device(request: LoadRequest, device: Any) -> None:
    """Refuse float8 on NVIDIA GPUs that have none."""
    capability = getattr(device, "compute_capability", None) if device.platform in ("gpu", "cuda") else None
    if "float8" not in (request.weights, request.kv_dtype) or not isinstance(capability, str):
        return
    if tuple(int(part) for part in capability.split(".")) < FLOAT8_CAPABILITY:
        raise InvalidArgument(
            f"float8 needs a GPU of compute capability 8.9 (Ada, Hopper or later), and {device.device_kind} "
            f"has {capability}: use int8"
        )


def find_weights(request: LoadRequest) -> Plan:
    """A kept checkpoint of the source where there is one, else the source itself."""
    if checkpoint.is_checkpoint(request.source):
        return _kept(Path(request.source), request)
    folder = None
    if request.source.startswith(PREFIX):
        made = open_source(request.source)
        family = families.find(made)
        return Plan(family, family.configure[made.format](made), folder, False, made)
    if not Path(request.source).exists():
        raise NotFound(f"no model at {request.source}")
    if request.cache:
        folder = Path(request.cache) / "weights" / checkpoint.key_of(request.source, precision_of(request))
        try:
            if checkpoint.is_checkpoint(str(folder)):
                return _kept(folder, request)
        except InvalidArgument as damage:
            checkpoint.discard(folder, damage.message)
    source = open_source(request.source)
    family = families.find(source)
    return Plan(family, family.configure[source.format](source), folder, False, source)


def precision_of(request: LoadRequest) -> str:
    """The precision of the parameters in one word, such as bfloat16 or bfloat16-int8."""
    return request.dtype if request.weights == "same" else f"{request.dtype}-{request.weights}"


def _kept(folder: Path, request: LoadRequest) -> Plan:
    name, config, shapes = checkpoint.read_manifest(folder)
    expected = parameters(config, DTYPES[request.dtype], OneDevice(jax.devices()[0]), request.weights)[2]
    if {path: x.dtype for path, x in shapes.items()} != {path: x.dtype for path, x in expected.items()}:
        raise InvalidArgument(f"the checkpoint {folder} is not in {precision_of(request)}")
    return Plan(families.by_name(name), config, folder, True, None)


def _placed(tree: Any) -> Any:
    return jax.block_until_ready(tree)  # type: ignore[no-untyped-call]


def page_size(config: DecoderConfig, request: LoadRequest) -> int:
    """Bytes of one page over all layers, keys and values."""
    return config.layers * attention.page_bytes(config, request.page_tokens, KV_DTYPES[request.kv_dtype])


def _bytes_on_one(x: Any) -> int:
    """Bytes that a placed array takes on one of its devices."""
    return int(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)


def parameters(
    config: DecoderConfig,
    dtype: Any,
    place: Placement,
    weights: Precision = "same",
    stacks: tuple[int, int] = (0, 0),
) -> tuple[Any, Any, dict[str, Any]]:
    """The graph of what one device computes, its state's tree, and the model's parameters as they are loaded
    by dotted path, in that order; with room for so many adapters of a rank."""
    decoder, whole = (Decoder(made, abstract(dtype)) for made in (place.local(config), config))
    if weights != "same":
        decoder.quantise(quant.DTYPES[weights])
        whole.quantise(quant.DTYPES[weights])
    if stacks[0]:
        adapters.make_room(decoder, place.local(config), *stacks, abstract(dtype))
        adapters.make_room(whole, config, *stacks, abstract(dtype))
    place.cut(decoder)
    graph, tree = nnx.split(decoder)
    leaves = nnx.to_flat_state(nnx.state(whole))
    shapes = {".".join(map(str, path)): struct(leaf.shape, leaf.dtype) for path, leaf in leaves}
    return graph, jax.tree.structure(tree), place.kept(shapes)

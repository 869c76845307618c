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
import msgspec

from llmos.drivers.jax import attention, platform
from llmos.drivers.jax.adapters import adapters, lora
from llmos.drivers.jax.attention import AttentionBackend
from llmos.drivers.jax.attention.shared import SharedAttention, storage
from llmos.drivers.jax.decoder import quant, rope
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.execution.ledger import Limits
from llmos.drivers.jax.execution.programs import HEARTBEAT_S, Programs
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.loading.parameters import DTYPES, KV_DTYPES, bytes_on_one, page_size, parameters
from llmos.drivers.jax.loading.plan import Plan, find_weights
from llmos.drivers.jax.loading.requests import check_device, check_request, unguessed
from llmos.drivers.jax.loading.sizing import limits_of, spec_of, speculating_of
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.paging import sharing
from llmos.drivers.jax.paging.pool import Own, Pools, Share
from llmos.drivers.jax.paging.sharing import Member
from llmos.drivers.jax.pipeline.parts import Pipeline
from llmos.drivers.jax.sharding import mesh, stages
from llmos.drivers.jax.sharding.placement import OneDevice, Placement
from llmos.drivers.jax.speculation import verification
from llmos.drivers.jax.speculation.drafts import Draft, check_draft
from llmos.drivers.jax.speculation.speculating import Speculation
from llmos.drivers.jax.speculation.speculation import Policy
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.random import RandomSource, fill
from llmos.drivers.jax.weights.source import open_source
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadedModel, LoadProgress, LoadRequest
from llmos.drivers.sdk.sizes import with_tiers
from llmos.ipc import paths
from llmos.ipc.errors import InvalidArgument


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
        replica = Replica(self.limits, self.programs, ordered, caches, batch, common, speculation, self.make)
        engine = Engine(replica)
        engine.rehearse_later(self.programs.spec.ahead())
        return engine

    def _speculation(self) -> Speculation | None:
        speculating = self.programs.spec.speculating
        if speculating is None:
            return None
        policy = Policy(speculating.tokens, speculating.sizes, blind=self.draft is not None)
        allocate = self.draft.allocator(self.limits) if self.draft is not None else lambda: None

        def renew() -> tuple[verification.History, Any]:
            empty = verification.empty_history(self.limits.slots, self.limits.max_context)
            return jax.device_put(empty, self.place.common), allocate()

        weights = self.draft.weights() if self.draft is not None else None
        history, caches = renew()
        return Speculation(
            self.programs, policy, history, (weights, caches) if weights is not None else None, renew
        )


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
        dtype, rank = DTYPES[request.dtype], lora.stored_rank(request.adapter_rank, place.device.platform)
        graph, tree, kept = parameters(config, dtype, place, request.weights)
        roomy = graph, tree, kept
        if request.adapters:
            stacks = (request.adapters, rank)
            roomy = parameters(config, dtype, place, request.weights, stacks)
        shapes = place.arranged(config, roomy[2])
        self._native = self._timed("kernels", lambda: self._kernels(place))
        self._timed("link", lambda: place.link(self._compiled()))
        draft = self._draft(plan.config, place)
        member = self._member(plan.config, place, shapes)
        limits, width = limits_of(request, plan.config, place, shapes, draft, member)
        backend = self._backend(plan.config, place)
        if member is not None:
            backend = SharedAttention(backend, member.geometry)
        shape = Shape(
            graph=graph,
            tree=tree,
            backend=backend,
            page_tokens=limits.page_tokens,
            pages=limits.pages + (member.geometry.slab_pages if member is not None else 1),
            vocabulary=place.columns(config.vocab_size),
            native=self._native,
        )
        kv = storage(KV_DTYPES[request.kv_dtype], place.device.platform == "cpu")
        allocate = lambda config: backend.allocate(config, shape.pages, limits.page_tokens, kv)  # noqa: E731
        batch = lambda: state.empty_state(limits.slots, width, limits.pages, request.adapters > 0)  # noqa: E731
        cache_shapes, caches = place.caches(allocate, plan.config)
        ordered = list(shapes.values())
        spec = spec_of(request, shape, place, ordered, cache_shapes, jax.eval_shape(batch), limits)
        on_cpu = place.device.platform == "cpu"
        guesses = speculating_of(request, limits, draft, spec.decode_sizes, on_cpu)
        room = adapters.room(config, rank, list(shapes), dtype, roomy[:2]) if request.adapters else None
        spec = replace(spec, speculating=guesses, room=room)
        hold = member.caches if member is not None else lambda: Own(_placed(caches()))
        make = lambda: (hold(), _placed(jax.jit(batch, out_shardings=place.common)()))  # noqa: E731
        return Parts(place, limits, kept, shapes, Programs(spec), make, draft, member)

    def _member(self, config: DecoderConfig, place: Placement, shapes: dict[str, Any]) -> Member | None:
        if self.request.arena == "own":
            return None
        weights = sum(bytes_on_one(x) for x in shapes.values())
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
        kv = storage(KV_DTYPES[request.kv_dtype], place.device.platform == "cpu")
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
        return kernels.enable(self._compiled())

    def _compiled(self) -> Path:
        """The folder of kernels that are compiled here."""
        return (Path(self.request.cache) if self.request.cache else paths.cache_dir()) / "native"

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
            least_chunk=parts.programs.spec.least_chunk,
            sums=parts.programs.spec.place.sums,
            phases={name: round(seconds, 3) for name, seconds in self.phases.items()},
            **(parts.member.described() if parts.member is not None else {}),
        )


def _placed(tree: Any) -> Any:
    return jax.block_until_ready(tree)  # type: ignore[no-untyped-call]

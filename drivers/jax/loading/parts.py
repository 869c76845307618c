"""What a replica is made of before its weights are there: sizes, programs, and what allocates its caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import msgspec

from llmos.drivers.jax.adapters import adapters, lora
from llmos.drivers.jax.attention import selection
from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.shared import SharedAttention, storage
from llmos.drivers.jax.decoder import rope
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.execution.ledger import Limits
from llmos.drivers.jax.execution.programs import Programs
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.loading.parameters import DTYPES, KV_DTYPES, bytes_on_one, parameters
from llmos.drivers.jax.loading.phases import Phases
from llmos.drivers.jax.loading.plan import Plan, find_weights
from llmos.drivers.jax.loading.sizing import limits_of, spec_of, speculating_of
from llmos.drivers.jax.loading.weights import load_weights, placed
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.paging import sharing
from llmos.drivers.jax.paging.pool import Own, Pools, Share
from llmos.drivers.jax.paging.sharing import Member
from llmos.drivers.jax.pipeline.parts import Pipeline
from llmos.drivers.jax.sharding import mesh
from llmos.drivers.jax.sharding.placement import OneDevice, Placement
from llmos.drivers.jax.speculation import verification
from llmos.drivers.jax.speculation.drafts import Draft, check_draft
from llmos.drivers.jax.speculation.speculating import Speculation
from llmos.drivers.jax.speculation.speculation import Policy
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc import paths


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
        engine.rehearse_later(self.programs.ahead())
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
class Maker:
    """Makes the parts of a model's replicas, as the ``request`` for it asks; see ``Load``."""

    request: LoadRequest
    attention: str
    pools: Pools
    phases: Phases

    def replica(self, plan: Plan, places: list[Placement]) -> Parts | Pipeline:
        """One replica's sizes and programs; nothing is on its devices yet."""
        made = [self._stage(plan, place) for place in places]
        if len(made) == 1:
            return made[0]
        pages = [part.limits.pages for part in made]
        if len(set(pages)) > 1:
            # Block tables are the same in all stages, so the one with the least room decides.
            alike = replace(self, request=msgspec.structs.replace(self.request, pages=min(pages)))
            made = [alike._stage(plan, place) for place in places]
        return Pipeline.join(made, struct((plan.config.hidden,), DTYPES[self.request.dtype]))

    def _stage(self, plan: Plan, place: Placement) -> Parts:
        """As ``replica``, of one pipeline stage of a replica, or of all of it."""
        request = self.request
        config = rope.for_context(plan.config, request.max_context)
        dtype, rank = DTYPES[request.dtype], lora.stored_rank(request.adapter_rank, place.device.platform)
        graph, tree, kept = parameters(config, dtype, place, request.weights)
        roomy = graph, tree, kept
        if request.adapters:
            stacks = (request.adapters, rank)
            roomy = parameters(config, dtype, place, request.weights, stacks)
        shapes = place.arranged(config, roomy[2])
        native = self.phases.timed("kernels", lambda: self._kernels(place))
        self.phases.timed("link", lambda: place.link(self._compiled()))
        draft = self._draft(plan.config, place, native)
        member = self._member(plan.config, place, shapes)
        limits, width = limits_of(request, plan.config, place, shapes, draft, member)
        backend = self._backend(plan.config, place, native)
        if member is not None:
            backend = SharedAttention(backend, member.geometry)
        shape = Shape(
            graph=graph,
            tree=tree,
            backend=backend,
            page_tokens=limits.page_tokens,
            pages=limits.pages + (member.geometry.slab_pages if member is not None else 1),
            vocabulary=place.columns(config.vocab_size),
            native=native,
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
        hold = member.caches if member is not None else lambda: Own(placed(caches()))
        make = lambda: (hold(), placed(jax.jit(batch, out_shardings=place.common)()))  # noqa: E731
        return Parts(place, limits, kept, shapes, Programs(spec), make, draft, member)

    def _member(self, config: DecoderConfig, place: Placement, shapes: dict[str, Any]) -> Member | None:
        if self.request.arena == "own":
            return None
        weights = sum(bytes_on_one(x) for x in shapes.values())
        return sharing.join(self.pools, self.request, config, place.device, weights)

    def _draft(self, config: DecoderConfig, place: Placement, native: bool) -> Draft | None:
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
        backend = self._backend(plan.config, place, native)
        phases = Phases(self.phases.report)
        load = lambda: place.arrange(plan.config, load_weights(plan, own.source, kept, phases))  # noqa: E731
        shapes = place.arranged(turned, kept)
        kv = storage(KV_DTYPES[request.kv_dtype], place.device.platform == "cpu")
        return Draft(place, plan.config, graph, tree, backend, shapes, load, kv, native)

    def _backend(self, config: DecoderConfig, place: Placement, native: bool) -> AttentionBackend:
        local, device = place.local(config), place.device.platform
        # The TPU's kernel wants keys and values of a token side by side, which a pool has not.
        name = "xla" if device == "tpu" and self.request.arena == "shared" else self.attention
        return place.attention(selection.select(name, device, local, self.request, native))

    def _kernels(self, place: Placement) -> bool:
        """Whether this model runs on the CPU's own kernels, which know one device only."""
        if place.device.platform != "cpu" or not isinstance(place, OneDevice) or self.attention == "xla":
            return False
        return kernels.enable(self._compiled())

    def _compiled(self) -> Path:
        """The folder of kernels that are compiled here."""
        return (Path(self.request.cache) if self.request.cache else paths.cache_dir()) / "native"

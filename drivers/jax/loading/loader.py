"""Loading a model: find the weights, size the cache, compile ahead, and put an engine together.

Restoring or converting the weights runs beside compiling, for compiling needs only their shapes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import msgspec

from llmos.drivers.jax import platform
from llmos.drivers.jax.adapters import adapters
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.loading.parameters import page_size
from llmos.drivers.jax.loading.parts import Maker, Parts
from llmos.drivers.jax.loading.phases import Phases
from llmos.drivers.jax.loading.plan import Plan, find_weights
from llmos.drivers.jax.loading.requests import check_device, check_request, unguessed
from llmos.drivers.jax.loading.weights import load_weights, placed
from llmos.drivers.jax.paging.pool import Pools
from llmos.drivers.jax.pipeline.parts import Pipeline
from llmos.drivers.jax.sharding import mesh, stages
from llmos.drivers.jax.sharding.mesh import Axes
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.drivers.sdk.sizes import with_tiers
from llmos.ipc.errors import InvalidArgument


class Load:
    """One load onto some of the ``devices``; ``report`` is told how far it is."""

    def __init__(
        self, request: LoadRequest, devices: list[Any], report: Progress, attention: str, pools: Pools
    ) -> None:
        self.request = request
        self.devices = devices
        self.attention = attention
        self.pools = pools
        self.phases = Phases(report)

    def run(self) -> tuple[list[Engine], LoadedModel]:
        """Load everything: an engine for each replica; InvalidArgument names what is wrong with the model or
        the request."""
        axes = self._check()
        self.phases.begin()
        if self.request.cache:
            platform.keep_programs(str(Path(self.request.cache) / "programs"))
        plan = self.phases.timed("read", lambda: find_weights(self.request))
        mesh.check_model(axes, plan.config)
        self.request = self._with_tiers(page_size(plan.config, self.request))
        first, *others = stages.places(self.devices, axes, plan.config)
        maker = Maker(self.request, self.attention, self.pools, self.phases)
        parts = maker.replica(plan, first)
        with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
            placing = pool.submit(self.phases.timed, "place", parts.make)
            loading = pool.submit(self._weights, plan, parts)
            self.phases.timed("compile", lambda: parts.programs.compile_ahead(self.phases.compiling(loading)))
            weights = self.phases.timed("wait", lambda: self.phases.attend(loading))
            engines = [parts.engine(weights, *self.phases.attend(placing))]
        if others:
            # Replicas are alike to the scheduler, whatever is free on their devices.
            own = msgspec.structs.replace(self.request, pages=parts.limits.pages)
            alike = replace(maker, request=own)
            copies = lambda: [self._replica(alike.replica(plan, each), weights) for each in others]  # noqa: E731
            engines += self.phases.timed("replicate", copies)
        return engines, self._loaded(plan, parts, len(engines))

    def _check(self) -> Axes:
        """Refuse what cannot be before anything is read."""
        request = self.request
        check_request(request)
        adapters.check(request)
        axes = mesh.parse(request.mesh)
        mesh.check_devices(axes, len(self.devices))
        wanted = max(request.host_pages, request.disk_pages, request.host_bytes, request.disk_bytes)
        if wanted > 0 and self._cut:
            raise InvalidArgument(
                "pages of a model that is cut over several devices cannot leave them: "
                "leave host_pages and disk_pages 0, or use the data axis only"
            )
        if axes.pipeline > 1:
            self.request = request = unguessed(request)
        check_device(request, self.devices[0])
        return axes

    @property
    def _cut(self) -> bool:
        """Whether a page is cut over several devices."""
        return any(size > 1 for axis, size in self.request.mesh.items() if axis != "data")

    def _with_tiers(self, page_bytes: int) -> LoadRequest:
        """The request with sizes for tiers that were left to us: pages that are cut stay on the devices."""
        no_host = self._cut or self.devices[0].platform == "cpu"
        return with_tiers(self.request, page_bytes * self.request.mesh.get("data", 1), no_host=no_host)

    def _replica(self, parts: Parts | Pipeline, weights: dict[str, jax.Array]) -> Engine:
        """Another replica, with a copy of the first one's weights."""
        parts.programs.compile_ahead(self.phases.compiling(None))
        own = {path: jax.device_put(weights[path], x.sharding) for path, x in parts.shapes.items()}
        return parts.engine(placed(own), *parts.make())

    def _weights(self, plan: Plan, parts: Parts | Pipeline) -> dict[str, jax.Array]:
        """Parameters as programs take them."""
        kept = load_weights(plan, self.request.source, parts.kept, self.phases)
        return parts.arrange(plan.config, kept) | adapters.empty(parts.shapes)

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
            phases=self.phases.described(),
            **(parts.member.described() if parts.member is not None else {}),
        )

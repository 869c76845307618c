"""Loading an encoder: as a decoder's (``loader``), without a cache of keys and values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax import platform
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import abstract, struct
from llmos.drivers.jax.encoders.encoder import Encoder, EncoderConfig
from llmos.drivers.jax.encoders.engine import EncoderEngine, EncoderPrograms, EncoderSpec, length_buckets
from llmos.drivers.jax.families import bert
from llmos.drivers.jax.loading.phases import Phases
from llmos.drivers.jax.loading.plan import Plan
from llmos.drivers.jax.loading.requests import check_request
from llmos.drivers.jax.loading.weights import load_weights
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.pooling import read_pooling
from llmos.drivers.jax.weights.random import PREFIX
from llmos.drivers.jax.weights.safetensors import read_json
from llmos.drivers.jax.weights.source import open_source
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc.errors import InvalidArgument

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_FIRST_ON_CPU = 2
_FIRST_EACH = 2
"""Programs for each length that an accelerator waits for: of one text, and of as many as a step takes."""
_LEAST_TOKENS = 2048
"""Fewer take an accelerator as long: it reads the weights and starts some hundred kernels."""


def is_encoder(source: str) -> bool:
    """Whether a model is one, by its small files alone; what cannot be read is for the loader to refuse."""
    where = Path(source.removeprefix(PREFIX))
    if checkpoint.is_checkpoint(source):
        return read_json(where / "manifest.json").get("family") == bert.FAMILY.name
    file = where / "config.json" if where.is_dir() else where
    if file.name != "config.json" and not source.startswith(PREFIX):
        return False
    names = read_json(file).get("architectures") if file.exists() else None
    return bool(names) and isinstance(names, list) and names[0] in bert.ARCHITECTURES


class EncoderLoad:
    """One load onto the first of the ``devices``; ``report`` is told how far it is."""

    def __init__(self, request: LoadRequest, devices: list[Any], report: Progress) -> None:
        self.request = request
        self.devices = devices
        self.phases = Phases(report)

    def run(self) -> tuple[Any, LoadedModel]:
        """Load everything; InvalidArgument names what is wrong with the model or the request."""
        request = self.request
        check_request(request)
        if request.dtype not in DTYPES:
            raise InvalidArgument(f"an encoder's dtype is one of {', '.join(DTYPES)}, not {request.dtype}")
        if request.weights != "same":
            raise InvalidArgument(f'an encoder has no {request.weights} weights: leave weights "same"')
        if prod(request.mesh.values()) != 1:
            raise InvalidArgument("an encoder runs on one device: leave mesh empty")
        self.phases.begin()
        if request.cache:
            platform.keep_programs(str(Path(request.cache) / "programs"))
        plan = self.phases.timed("read", lambda: find_encoder(request))
        config = cast(EncoderConfig, plan.config)
        graph, tree, shapes = parameters(config, DTYPES[request.dtype], self.devices[0])
        programs = EncoderPrograms(self._encoder_spec(config, graph, tree, list(shapes.values())))
        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            loading = pool.submit(load_weights, plan, request.source, shapes, self.phases)
            self.phases.timed("compile", lambda: programs.compile_ahead(self.phases.compiling(loading)))
            weights = self.phases.timed("wait", lambda: self.phases.attend(loading))
        engine = EncoderEngine(config, programs, [weights[path] for path in shapes])
        return engine, self._described(config, programs.encoder, shapes)

    def _encoder_spec(self, config: EncoderConfig, graph: Any, tree: Any, weights: list[Any]) -> EncoderSpec:
        lengths = length_buckets(min(config.max_tokens, self.request.max_context))
        on_cpu = self.devices[0].platform == "cpu"
        return EncoderSpec(
            graph=graph,
            tree=tree,
            weights=weights,
            lengths=lengths,
            step_tokens=max(self.request.chunk_tokens, lengths[-1]),
            first=_FIRST_ON_CPU if on_cpu else _FIRST_EACH * len(lengths),
            least=0 if on_cpu else _LEAST_TOKENS,
        )

    def _described(self, config: EncoderConfig, spec: EncoderSpec, shapes: dict[str, Any]) -> LoadedModel:
        return LoadedModel(
            model=self.request.model,
            family=bert.FAMILY.name,
            kind="encoder",
            width=config.width,
            labels=list(config.names),
            exclusive=config.exclusive,
            token_types=config.types,
            parameters=sum(prod(x.shape) for x in shapes.values()),
            weight_bytes=sum(prod(x.shape) * x.dtype.itemsize for x in shapes.values()),
            pages=0,
            page_tokens=0,
            page_bytes=0,
            slots=0,
            max_context=spec.lengths[-1],
            chunk_tokens=spec.step_tokens,
            vocab_size=config.vocab_size,
            stop_tokens=[],
            attention="dense",
            phases=self.phases.described(),
        )


def find_encoder(request: LoadRequest) -> Plan:
    """Where the weights are: a kept checkpoint of the source where there is one. The configuration is always
    the source's, for pooling and labels are read from more files than a checkpoint is kept for."""
    if checkpoint.is_checkpoint(request.source):
        _, kept, _ = checkpoint.read_manifest(Path(request.source), EncoderConfig)
        return _plan(kept, Path(request.source), True)
    source = open_source(request.source)
    where = Path(request.source)
    config = bert.configure(source, read_pooling(where) if where.is_dir() else None)
    if not where.is_dir() or not request.cache:
        return _plan(config, None, False, source)
    folder = Path(request.cache) / "weights" / checkpoint.key_of(request.source, request.dtype)
    return _plan(config, folder, checkpoint.is_checkpoint(str(folder)), source)


def _plan(config: EncoderConfig, folder: Path | None, kept: bool, source: Any = None) -> Plan:
    return Plan(bert.FAMILY, cast(DecoderConfig, config), folder, kept, source)


def parameters(config: EncoderConfig, dtype: Any, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The encoder's graph, its state's tree, and the parameters' shapes by dotted path, in that order."""
    graph, tree = nnx.split(Encoder(config, abstract(dtype)))
    placed = jax.sharding.SingleDeviceSharding(device)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(tree)}
    shapes = {path: struct(leaf.shape, leaf.dtype, placed) for path, leaf in leaves.items()}
    return graph, jax.tree.structure(tree), shapes

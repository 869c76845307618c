"""Where the weights of a model come from: a kept checkpoint, or the source it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from llmos.drivers.jax import families
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.loading.parameters import DTYPES, parameters
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.random import PREFIX
from llmos.drivers.jax.weights.source import Source, open_source
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument, NotFound


@dataclass
class Plan:
    """What to load and from where: a kept checkpoint if ``kept``, else ``source``."""

    family: families.Family
    config: DecoderConfig
    folder: Path | None
    kept: bool
    source: Source | None


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

"""The parameters of a model as they are loaded, and what they and its pages take."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.adapters import adapters
from llmos.drivers.jax.attention import selection
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import Decoder, abstract, struct
from llmos.drivers.jax.sharding.placement import Placement
from llmos.drivers.sdk.messages import LoadRequest, Precision

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KV_DTYPES = {**DTYPES, **quant.DTYPES}


def page_size(config: DecoderConfig, request: LoadRequest) -> int:
    """Bytes of one page over all layers, keys and values."""
    return config.layers * selection.page_bytes(config, request.page_tokens, KV_DTYPES[request.kv_dtype])


def bytes_on_one(x: Any) -> int:
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

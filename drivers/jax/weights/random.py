"""Random weights in the shape of a real model: ``random:PATH`` of a ``config.json``, for measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.weights.source import Format
from llmos.ipc.errors import InvalidArgument, NotFound

PREFIX = "random:"
_MAX_JSON = 1 << 20


class RandomSource:
    """A checkpoint that has a configuration, and makes its tensors up on the device."""

    format: Format = "safetensors"

    def __init__(self, path: str) -> None:
        file = Path(path)
        if not file.is_file():
            raise NotFound(f"no config.json at {path}")
        if file.stat().st_size > _MAX_JSON:
            raise InvalidArgument(f"{path} is over {_MAX_JSON} bytes")
        try:
            self.config: dict[str, Any] = json.loads(file.read_bytes())
        except ValueError:
            raise InvalidArgument(f"{path} is not JSON") from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    def read(self, name: str) -> np.ndarray:
        raise InvalidArgument(f"tensor '{name}' has random values; it cannot be read")


def fill(shapes: dict[str, Any], seed: int = 0) -> dict[str, jax.Array]:
    """Parameters by path: ones for vectors, else normal values that keep activations near one.

    What is to be quantised is drawn in bfloat16, one tensor at a time, so that little more is held at once.
    """
    made: dict[str, jax.Array] = {}
    scales = quant.scale_paths(shapes)
    for index, (path, wanted) in enumerate(shapes.items()):
        if path in scales:
            continue
        if len(wanted.shape) == 1:
            made[path] = jax.device_put(jnp.ones(wanted.shape, wanted.dtype), wanted.sharding)
            continue
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), index)
        eight = quant.is_quantised(wanted.dtype)
        drawn = _drawer(wanted.shape, jnp.bfloat16 if eight else wanted.dtype, wanted.sharding)(key)
        made |= quant.placed(drawn, path, shapes) if eight else {path: drawn}
    return made


@cache
def _drawer(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[jax.Array], jax.Array]:
    def draw(key: jax.Array) -> jax.Array:
        return jnp.asarray(jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5, dtype)

    return jax.jit(draw, out_shardings=sharding)

"""Random weights in the shape of a real model: ``random:PATH`` of a ``config.json``, for measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    """Parameters by path: ones for vectors, else normal values that keep activations near one."""
    made = {}
    for index, (path, wanted) in enumerate(shapes.items()):
        if len(wanted.shape) == 1:
            made[path] = jax.device_put(jnp.ones(wanted.shape, wanted.dtype), wanted.sharding)
            continue
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), index)
        draw = jax.jit(
            lambda key, shape=wanted.shape, dtype=wanted.dtype: (
                jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
            ).astype(dtype),
            out_shardings=wanted.sharding,
        )
        made[path] = draw(key)
    return made

"""From a checkpoint's tensors to the decoder's parameters, refusing whatever is wrong by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.families import Family, Part, Rules
from llmos.drivers.jax.weights.source import Source
from llmos.ipc.errors import InvalidArgument

Place = Callable[[str, np.ndarray], jax.Array]
"""(parameter path, value) -> the value on its device or devices."""


def convert(
    source: Source,
    family: Family,
    config: DecoderConfig,
    shapes: dict[str, Any],
    place: Place,
    progress: Callable[[int, int], None],
) -> dict[str, jax.Array]:
    """Parameters by path, as ``shapes`` (``jax.ShapeDtypeStruct`` by path) wants them, one at a time.

    Where it wants 8-bit values, they and their scale are computed on the device, from the file's values.

    Raises InvalidArgument naming the tensor that is missing, cut off, mis-shaped or not finite.
    """
    return apply(source, family.rules(config, source), shapes, place, progress)


def apply(
    source: Source,
    rules: Rules,
    shapes: dict[str, Any],
    place: Place,
    progress: Callable[[int, int], None],
) -> dict[str, jax.Array]:
    """As ``convert``, by the rules of any model."""
    scales = quant.scale_paths(shapes)
    wanted = {path: shape for path, shape in shapes.items() if path not in scales}
    for path in wanted:
        for part in rules[path]:
            _check_shape(source, part, shapes[path].shape)
    placed: dict[str, jax.Array] = {}
    for done, (path, shape) in enumerate(wanted.items()):
        progress(done, len(wanted))
        parts = [_read(source, part) for part in rules[path]]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if quant.is_quantised(shape.dtype):
            placed |= quant.placed(place(path, value), path, shapes)
        else:
            placed[path] = place(path, value.astype(shape.dtype, copy=False))
    progress(len(wanted), len(wanted))
    return placed


def _check_shape(source: Source, part: Part, whole: tuple[int, ...]) -> None:
    found, expected = source.shape(part.name), part.shape or (part.rows, *whole[1:])
    if found is None:
        raise InvalidArgument(f"tensor '{part.name}' is missing")
    if found != expected:
        raise InvalidArgument(f"tensor '{part.name}' has shape {list(found)}, expected {list(expected)}")


def _read(source: Source, part: Part) -> np.ndarray:
    value = source.read(part.name)
    if not np.isfinite(value.sum(dtype=np.float32)) and not np.isfinite(value).all():
        raise InvalidArgument(f"tensor '{part.name}' holds values that are not finite")
    return part.transform(value) if part.transform else value

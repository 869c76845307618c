"""8-bit weights and activations, int8 and float8 (e4m3): values with float32 scales, and products with them.

A weight has one scale for each output channel, symmetric about zero. How a product is carried out is chosen
here alone, when it is traced. "native" quantises the activations too, each row by its own largest value, and
multiplies 8-bit operands; on NVIDIA GPUs from Ada on XLA hands a float8 product whose operands are both
float8 to cuBLASLt (its GemmRewriter matches nothing but scalar scales, so scales of rows and channels are
applied to the result, in whatever is fused to it). "widened" leaves the activations as they are and converts
the weight inside the product. XLA:CPU would write a converted matrix to memory; "blocked" converts a piece
that stays in cache at a time, or leaves it to a native kernel, which converts in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmos.drivers.jax import platform as settings
from llmos.drivers.jax.native import kernels

Way = Literal["native", "widened", "blocked"]
Dense = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(x [rows, in], weight [out, in], dtype of the result) -> [rows, out], of one floating-point dtype."""

DTYPES: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "float8": jnp.dtype(jnp.float8_e4m3fn)}
FEW_ROWS = 64  # so many still wait for an int8 weight to be read: an H200 reads one while it multiplies 90
FLOAT8_TILE = 16  # cuBLASLt wants multiples of it; XLA would pad a copy of the weight at every step
BLOCK = 1 << 18  # weights converted at a time on a CPU: 1 MiB of float32
_LARGEST = {DTYPES["int8"]: 127.0, DTYPES["float8"]: 448.0}
_LEAST = 1e-30  # keeps the scale of what is all zero from being zero itself


def is_quantised(dtype: Any) -> bool:
    """Whether arrays of this dtype need a scale."""
    return jnp.dtype(dtype) in _LARGEST


def quantise(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``x`` [..., n] as 8-bit values [..., n] times float32 scales [...], one for each run of the last axis.

    The largest value of a run becomes the largest that ``dtype`` has. What is not finite makes its scale so.
    """
    wide = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.maximum(top, _LEAST) / _LARGEST[jnp.dtype(dtype)]
    scaled = wide / scale
    rounded = jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled
    return rounded.astype(dtype), scale[..., 0]


def quantised(x: Any, dtype: Any) -> tuple[Any, Any]:
    """As ``quantise``; of a ``jax.ShapeDtypeStruct`` only the shapes."""
    run = partial(quantise, dtype=dtype)
    result: tuple[Any, Any] = jax.eval_shape(run, x) if isinstance(x, jax.ShapeDtypeStruct) else run(x)
    return result


def placed(x: jax.Array, path: str, shapes: dict[str, Any]) -> dict[str, jax.Array]:
    """The float weight ``x`` quantised as ``shapes`` wants it: values and scale by path, in their places."""
    wanted, scale = shapes[path], shapes[scale_path(path)]
    values = _quantiser(jnp.dtype(wanted.dtype), wanted.sharding, scale.sharding)(x)
    return dict(zip((path, scale_path(path)), values))


@cache
def _quantiser(dtype: Any, values: Any, scale: Any) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return jax.jit(partial(quantise, dtype=dtype), out_shardings=(values, scale))


def choose(dtype: Any, rows: int, out: int, inner: int, platform: str) -> Way:
    """How ``rows`` are multiplied with a quantised weight [out, inner] on a platform.

    On a CPU int8 activations would be faster, but cost several times as much accuracy as int8 weights alone.
    """
    if platform == "cpu":
        return "blocked"
    if jnp.dtype(dtype) == jnp.int8:
        return "native" if rows > FEW_ROWS else "widened"
    if rows <= settings.FEW_TOKENS:
        return "widened"
    tiled = out % FLOAT8_TILE == 0 and inner % FLOAT8_TILE == 0
    return "native" if platform in ("gpu", "cuda") and tiled else "widened"


def product(x: jax.Array, weight: jax.Array, scale: jax.Array, out: Any, dense: Dense) -> jax.Array:
    """``x`` [..., in] times ``weight`` [out, in] with ``scale`` [out] -> [..., out] in dtype ``out``."""
    rows = x.reshape(-1, x.shape[-1])
    channels, inner = weight.shape
    way = choose(weight.dtype, rows.shape[0], channels, inner, jax.default_backend())
    if way == "native":
        values, each = quantise(rows, weight.dtype)
        raw = native(values, weight, out).astype(jnp.float32) * each[:, None]
    elif way == "blocked" and kernels.suits(rows, weight):
        raw = kernels.product(rows, weight, out).astype(jnp.float32)
    elif way == "blocked":
        raw = blocked(rows, weight, out, dense).astype(jnp.float32)
    else:
        raw = dense(rows, weight.astype(x.dtype), out).astype(jnp.float32)
    return (raw * scale).astype(out).reshape(*x.shape[:-1], channels)


def native(values: jax.Array, weight: jax.Array, out: Any) -> jax.Array:
    """8-bit values [rows, in] times an 8-bit weight [out, in]: int32, or ``out`` where they are float8."""
    wide = jnp.int32 if values.dtype == jnp.int8 else out
    return jax.lax.dot_general(values, weight, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def blocked(rows: jax.Array, weight: jax.Array, out: Any, dense: Dense) -> jax.Array:
    """``rows`` [n, in] times ``weight`` [out, in], which is converted ``BLOCK`` values at a time."""
    channels, inner = weight.shape
    sizes = (n for n in range(1, channels + 1) if channels % n == 0)
    pieces = next(n for n in sizes if channels // n * inner <= BLOCK or n == channels)
    parts = weight.reshape(pieces, channels // pieces, inner)
    done = jax.lax.map(lambda part: dense(rows, part.astype(rows.dtype), out), parts)
    return jnp.moveaxis(done, 0, 1).reshape(rows.shape[0], channels)


def scale_path(path: str) -> str:
    """The path of the scale that belongs to a weight's path."""
    stem, _, last = path.rpartition(".")
    return f"{stem}.scale" if last == "weight" else f"{path}_scale"


def scale_paths(shapes: dict[str, Any]) -> set[str]:
    """The paths of all scales among parameters by path."""
    return {scale_path(path) for path, x in shapes.items() if is_quantised(x.dtype)}

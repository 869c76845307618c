"""The kernels against NumPy, before any model depends on them: compilers and processors differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention import DecodePlan
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.xla import PagedCache
from llmos.drivers.jax.native import kernels
from llmos.ipc.errors import NotSupported

TOLERANCE = 1e-3


def run() -> None:
    """NotSupported if a kernel computes something else than NumPy."""
    random = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        tried = {"attention": _attention(random)}
        for dtype in (jnp.float32, jnp.bfloat16):
            for rows in (5, 41, 133):
                tried[f"product of {rows} rows in {jnp.dtype(dtype)}"] = _product(random, rows, dtype)
        for name, (got, expected) in tried.items():
            if not np.allclose(got, expected, atol=TOLERANCE):
                worst = np.abs(got - expected).max()
                raise NotSupported(f"the native kernel for {name} computes wrongly here: off by {worst:g}")


def _product(random: np.random.Generator, rows: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sizes that fill no vector and no tile."""
    made = (random.standard_normal(shape, np.float32) for shape in ((rows, 86), (29, 86)))
    x, weight = (jnp.asarray(each, dtype) for each in made)
    got = jax.jit(lambda x, weight: kernels.product(x, weight, jnp.float32))(x, weight)
    return np.asarray(got), np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T


def _attention(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four heads over one key head, 7 tokens on two pages of 4; the seventh is new."""
    q, k, v = (random.standard_normal((1, heads, 32), np.float32) for heads in (4, 1, 1))
    keys, values = (random.standard_normal((3, 1, 4, 32), np.float32) for _ in range(2))
    plan = DecodePlan(*(np.asarray(x, np.int32) for x in ([[2, 0]], [7], [0], [2])))  # type: ignore[arg-type]
    out, cache = jax.jit(NativeAttention().decode)(plan, PagedCache(keys, values), q, k, v)  # type: ignore[arg-type]
    keys[0, 0, 2], values[0, 0, 2] = k[0, 0], v[0, 0]
    known, held = (part[[2, 0], 0].reshape(8, 32)[:7] for part in (keys, values))
    weights = np.exp(q[0] @ known.T / np.sqrt(32))
    expected = weights / weights.sum(-1, keepdims=True) @ held
    written = np.concatenate([np.ravel(out), np.ravel(cache.k), np.ravel(cache.v)])
    return written, np.concatenate([expected.ravel(), keys.ravel(), values.ravel()])

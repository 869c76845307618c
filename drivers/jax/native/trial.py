"""The kernels against NumPy, before any model depends on them: compilers and processors differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.plans import DecodePlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.rope import rotate, rotation
from llmos.drivers.jax.execution.state import pack_choices
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sampling.noise import threefry
from llmos.drivers.sdk.messages import Sampling
from llmos.ipc.errors import NotSupported

TOLERANCE = 1e-3
COARSE = 3e-2
"""Of results in bfloat16, which reach 4."""


def run() -> None:
    """NotSupported if a kernel computes something else than NumPy."""
    random = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        tried = {"attention": _attention(random)}
        for dtype in (jnp.float32, jnp.bfloat16):
            tried[f"attention of prompts in {jnp.dtype(dtype)}"] = _prompt(random, dtype)
            tried[f"gates in {jnp.dtype(dtype)}"] = _gate(random, dtype)
            for rows in (5, 41, 133):
                tried[f"product of {rows} rows in {jnp.dtype(dtype)}"] = _product(random, rows, dtype)
        tried["choice of tokens"] = _choice(random)
        for name, (got, expected) in tried.items():
            tolerance = COARSE if got.dtype == jnp.bfloat16 else TOLERANCE
            worst = np.abs(got.astype(np.float32) - expected).max()
            if not worst <= tolerance:
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


def _prompt(random: np.random.Generator, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Three heads over one key head, 5 tokens behind 290 on pages of 8, of which a window of 270 is seen."""
    q, k, v = (jnp.asarray(random.standard_normal((1, 5, n, 48), np.float32), dtype) for n in (3, 1, 1))
    keys, values = (jnp.asarray(random.standard_normal((38, 1, 8, 48), np.float32), dtype) for _ in range(2))
    table, place = random.permutation(37)[None], 290 + np.arange(5)
    plan = VerifyPlan(
        *(jnp.asarray(x, jnp.int32) for x in (table, [290], [295], table[:, place // 8], place[None] % 8))
    )
    turn = rotation(jnp.asarray(place)[None], np.asarray([1.0, 0.3, 0.01], np.float32))
    seen = Scoring(window=270, cap=4.0)
    extend = lambda cache, *new: NativeAttention().extend(plan, cache, Projected.of(*new), scoring=seen)  # noqa: E731
    out, cache = jax.jit(extend)(PagedCache(keys, values), q, k, v, turn)
    known, held = (np.asarray(x, np.float32)[table[0], 0].reshape(-1, 48) for x in (cache.k, cache.v))
    expected = []
    for token, turned in enumerate(np.asarray(rotate(q, *turn), np.float32)[0]):
        behind = slice(21 + token, 291 + token)
        scores = np.tanh(turned @ known[behind].T / np.sqrt(48) / 4) * 4
        weights = np.exp(scores)
        expected.append(weights / weights.sum(-1, keepdims=True) @ held[behind])
    new = np.asarray(rotate(k, *turn), np.float32)[0, :, 0]
    written = np.concatenate([np.ravel(out), known[290:295].ravel(), held[290:295].ravel()])
    return written.astype(dtype), np.concatenate(
        [np.ravel(expected), new.ravel(), np.asarray(v, np.float32).ravel()]
    )


def _gate(random: np.random.Generator, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both activations, of sizes that fill no vector."""
    x = jnp.asarray(random.standard_normal((9, 2, 37), np.float32), dtype)
    got = [jax.jit(kernels.gate, static_argnums=1)(x.reshape(9, 74), kind) for kind in ("silu", "gelu_tanh")]
    a, b = np.asarray(x, np.float32).swapaxes(0, 1)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))
    expected = np.stack([a / (1 + np.exp(-a)) * b, a / 2 * (1 + tanh) * b])
    return np.asarray(jnp.stack(got)), expected


def _choice(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows that ask for one thing each, and for all; of a size that fills no vector."""
    asked = [Sampling(temperature=0.7, seed=5, **each) for each in ({}, {"top_k": 9}, {"top_p": 0.8})]
    asked += [Sampling(), Sampling(temperature=1.3, top_k=90, top_p=0.9, min_p=0.02, seed=2**32 - 1)]
    rows = np.tile(random.standard_normal((1, 301), np.float32) * 3, (len(asked), 1))
    position = np.arange(len(asked), dtype=np.int32)
    got = jax.jit(kernels.choose, static_argnums=3)(rows, pack_choices(asked), position, True)
    expected = [_expected(*each) for each in zip(rows, asked, position.tolist(), strict=True)]
    return np.asarray(got), np.asarray(expected)


def _expected(row: np.ndarray, asked: Sampling, position: int) -> int:
    """By sorting."""
    if not asked.temperature:
        return int(row.argmax())
    heated = row.astype(np.float64) / asked.temperature
    order = np.argsort(-heated)[: asked.top_k or None]
    share = np.exp(heated[order] - heated.max())
    share /= share.sum()
    order = order[(np.cumsum(share) - share < asked.top_p) & (share >= asked.min_p * share[0])]
    words = [np.asarray([word], np.uint32) for word in (0, asked.seed, 0, position)]
    first, second = threefry(
        threefry((words[0], words[1]), (words[2], words[3])), (words[0], order.astype(np.uint32))
    )
    uniform = np.maximum((first ^ second) >> 9, 1e-30) * 2.0**-23
    return int(order[np.argmax(heated[order] - np.log(-np.log(uniform)))])

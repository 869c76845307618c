"""Every backend over blocks of a pool gives and writes what it does over caches of a model alone."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.caches import PagedCache, held, numbers
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import DecodePlan, MixedPlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.shared import Geometry, SharedAttention, SharedCaches, storage
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.rope import Turn
from llmos.drivers.jax.paging import pages as blocks

LAYERS, HEADS, KV, TOKENS, SIZE = 3, 4, 2, 16, 32
CONFIG = DecoderConfig(100, 64, LAYERS, HEADS, KV, SIZE, 64, 1e-5, 1e4, 256)
PAGE = 2 * LAYERS * KV * TOKENS * SIZE
GEOMETRY = Geometry(LAYERS, (KV, TOKENS, SIZE), 4 * PAGE + 2 * KV * TOKENS * SIZE)
SLABS = 4
PAGES = SLABS * GEOMETRY.slab_pages
NOWHERE = PAGES
TABLES = jnp.asarray([[1, 6, 11, 12], [0, 2, 12, 12], [12, 12, 12, 12]], jnp.int32)
BACKENDS: dict[str, Any] = {
    "xla": XlaAttention(),
    "pallas": PallasAttention(interpret=True, fresh="xla"),
    "native": NativeAttention(),
}

gather, scatter = jax.jit(blocks.gather), jax.jit(blocks.scatter)


def random(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@cache
def caches(dtype: Any, on_cpu: bool) -> tuple[list[PagedCache], SharedCaches]:
    """The same contents in caches of a model alone, and in a pool that is full of something else."""
    shape = PAGES, KV, TOKENS, SIZE
    as_held = storage(dtype, on_cpu)
    own = [
        PagedCache(*(held(random(*shape, seed=10 * n + i), as_held) for i in (1, 2))) for n in range(LAYERS)
    ]
    pool = held(random(SLABS, GEOMETRY.slab, seed=7), as_held)
    every = jnp.arange(PAGES)
    return own, scatter(SharedCaches(pool, GEOMETRY), gather(own, every), every)


def plans() -> dict[str, tuple[Any, int]]:
    """Plans, and how many tokens they feed to a row; the last row writes nothing and reads nothing."""
    lengths, starts = jnp.asarray([35, 17, 0], jnp.int32), jnp.asarray([30, 14, 0], jnp.int32)
    counts = jnp.asarray([5, 3, 0], jnp.int32)
    at = jnp.maximum(lengths - 1, 0)
    last = jnp.take_along_axis(TABLES, at[:, None] // TOKENS, axis=1)[:, 0]
    fed = starts[:, None] + jnp.arange(5)
    into = jnp.take_along_axis(TABLES, fed // TOKENS, axis=1)
    into = jnp.where(jnp.arange(5) < counts[:, None], into, NOWHERE)
    first = jnp.arange(20)
    fresh = jnp.where(first < jnp.asarray([[20], [16], [0]]), TABLES[:, first // TOKENS], NOWHERE)
    zeros = jnp.zeros(3, jnp.int32)
    filled = jnp.asarray([20, 16, 0], jnp.int32)
    decode = DecodePlan(TABLES, lengths, jnp.where(lengths > 0, last, NOWHERE), at % TOKENS)
    verify = VerifyPlan(TABLES, starts, lengths, into, fed % TOKENS)
    both = MixedPlan(DecodePlan(*(x[:1] for x in decode)), VerifyPlan(*(x[1:] for x in verify)))
    return {
        "decode": (decode, 0),
        "verify": (verify, 5),
        "mixed": (both, 0),
        "prefill": (PrefillPlan(TABLES, starts, lengths, into, fed % TOKENS), 5),
        "fresh": (PrefillPlan(TABLES, zeros, filled, fresh, jnp.tile(first % TOKENS, (3, 1))), 20),
    }


def step(backend: AttentionBackend, kind: str, cache: Any, dtype: Any, scoring: Scoring) -> tuple[Any, Any]:
    plan, fed = plans()["decode" if kind == "step" else kind]
    shape = (len(plan.pages), fed) if fed else plan.pages.shape
    q, k, v = (random(*shape, n, SIZE, dtype=dtype, seed=s) for s, n in enumerate((HEADS, KV, KV), 20))
    if kind == "step":
        turns = (random(*shape, SIZE // 2, seed=s) for s in (30, 31))
        return backend.step(plan, cache, Projected.of(q, k, v, Turn(*turns)), scoring)
    if kind in ("decode", "verify", "mixed"):
        return getattr(backend, kind)(plan, cache, q, k, v, scoring)
    return backend.prefill(plan, cache, q, k, v, kind == "fresh", scoring)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("decode", "float32"),
        ("decode", "bfloat16"),
        ("step", "float32"),
        ("prefill", "float32"),
        ("fresh", "bfloat16"),
        ("verify", "float32"),
        ("mixed", "float32"),
        pytest.param("mixed", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_pool_is_read_and_written_as_caches_are(
    native_kernels: bool, name: str, kind: str, dtype: str
) -> None:
    if name == "native" and not native_kernels:
        pytest.skip("no native kernels")
    backend, kept = BACKENDS[name], jnp.dtype(dtype)
    alike, shared = caches(kept, on_cpu=name != "pallas")
    own = list(alike)
    scoring = Scoring(window=9)
    untouched = np.asarray(shared.pool)
    alone = jax.jit(partial(step, backend, kind, dtype=kept, scoring=scoring))
    among = jax.jit(partial(step, SharedAttention(backend, GEOMETRY), kind, dtype=kept, scoring=scoring))
    for number in (1, 2):
        expected, own[number] = alone(own[number])
        found, layer = among(shared.layer(number))
        shared = shared.with_layer(layer)
        np.testing.assert_array_equal(np.asarray(found)[:2], np.asarray(expected)[:2])
    every = jnp.arange(PAGES)
    np.testing.assert_array_equal(gather(shared, every), gather(own, every))
    rest = GEOMETRY.slab_pages * GEOMETRY.page
    np.testing.assert_array_equal(np.asarray(shared.pool)[:, rest:], untouched[:, rest:])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_what_is_not_finite_is_scrubbed(on_cpu: bool) -> None:
    _, shared = caches(jnp.bfloat16, on_cpu)
    first, second = gather(shared, jnp.asarray([3, 9]))
    bad = jax.lax.bitcast_convert_type(jnp.asarray([jnp.nan, jnp.inf], jnp.bfloat16), jnp.uint16)
    broken = first.at[:2].set(bad), second.at[-1].set(bad[0])
    shared = scatter(shared, broken, jnp.asarray([3, 9]))
    cleared = shared.scrubbed(jnp.asarray([3, PAGES + 5, PAGES + 5]))
    expected = first.at[:2].set(0), broken[1]
    np.testing.assert_array_equal(gather(cleared, jnp.asarray([3, 9])), expected)
    assert int((~jnp.isfinite(numbers(cleared.pool))).sum()) == 1

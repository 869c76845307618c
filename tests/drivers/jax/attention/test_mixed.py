"""Decoding rows and pieces of prompts attend in one pass as they do one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import DecodePlan, MixedPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.xla import XlaAttention

PAGE, PAGES, WIDTH, HEADS, KV, SIZE, PIECE = 8, 40, 6, 4, 2, 32, 4
BACKENDS = {"xla": XlaAttention(), "pallas": PallasAttention(interpret=True)}


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plan() -> MixedPlan:
    """Three rows that decode, one of them empty; a prompt in two pieces, another's only one, and none."""
    tables = jnp.asarray(
        np.random.default_rng(0).permutation(PAGES - 1)[: 5 * WIDTH].reshape(5, WIDTH), jnp.int32
    )
    lengths = jnp.asarray([9, 30, 0], jnp.int32)
    at = jnp.maximum(lengths - 1, 0)
    into = jnp.take_along_axis(tables[:3], at[:, None] // PAGE, axis=1)[:, 0]
    rows = DecodePlan(tables[:3], lengths, jnp.where(lengths > 0, into, PAGES), at % PAGE)
    own = tables[jnp.asarray([3, 3, 4, 4])]
    starts, counts = jnp.asarray([14, 18, 0, 0], jnp.int32), jnp.asarray([4, 3, 4, 0], jnp.int32)
    position = starts[:, None] + jnp.arange(PIECE)
    pages = jnp.take_along_axis(own, position // PAGE, axis=1)
    pages = jnp.where(jnp.arange(PIECE) < counts[:, None], pages, PAGES)
    ends = jnp.where(counts > 0, starts + counts, 0)
    return MixedPlan(rows, VerifyPlan(own, starts, ends, pages, position % PAGE))


@pytest.mark.parametrize(
    "scoring",
    [pytest.param(Scoring(), marks=pytest.mark.slow), Scoring(window=7)],
    ids=["full", "window"],
)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_one_pass_equals_decoding_and_then_each_piece(backend: AttentionBackend, scoring: Scoring) -> None:
    mixed = plan()
    cache: Any = PagedCache(normal(PAGES, KV, PAGE, SIZE, seed=1), normal(PAGES, KV, PAGE, SIZE, seed=2))
    tokens = len(mixed.pages)
    q, k, v = (normal(tokens, heads, SIZE, seed=3 + heads) for heads in (HEADS, KV, KV))
    out, written = backend.mixed(mixed, cache, q, k, v, scoring)
    own, others = mixed.part(out)
    (q, more_q), (k, more_k), (v, more_v) = (mixed.part(x) for x in (q, k, v))
    expected, cache = backend.decode(mixed.rows, cache, q, k, v, scoring)
    np.testing.assert_allclose(own[:2], expected[:2], atol=2e-6)
    for piece, count in enumerate((4, 3, 4)):
        alone = VerifyPlan(*(x[piece : piece + 1] for x in mixed.pieces))
        news = (x[piece : piece + 1] for x in (more_q, more_k, more_v))
        expected, cache = backend.verify(alone, cache, *news, scoring)  # type: ignore[call-arg,arg-type]
        np.testing.assert_allclose(others[piece, :count], expected[0, :count], atol=2e-6)
    np.testing.assert_array_equal(written.k, cache.k)
    np.testing.assert_array_equal(written.v, cache.v)

"""Paged attention equals dense attention, for any layout of pages, block size and length."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax import platform
from llmos.drivers.jax.attention.caches import BITS, held, numbers
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.config import DecoderConfig

PAGE, PAGES, WIDTH = 4, 64, 16
CONFIG = DecoderConfig(
    vocab_size=8,
    hidden=32,
    layers=1,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of one query [heads, size] over k and v [tokens, kv_heads, size]."""
    k, v = (np.repeat(x, CONFIG.heads // CONFIG.kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(CONFIG.head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v)


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def tables(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.permutation(PAGES - 1)[: rows * WIDTH].reshape(rows, WIDTH).astype(np.int32)


def prefilled(
    backend: XlaAttention,
    rng: np.random.Generator,
    table: np.ndarray,
    tokens: int,
    start: int = 0,
    cache: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any]:
    """Prefill one row with random keys and values; returns what went in and came out."""
    q, k, v = (random(rng, 1, tokens, heads, CONFIG.head_dim) for heads in (6, 2, 2))
    cache = cache or backend.allocate(CONFIG, PAGES, PAGE, jnp.float32)[0]
    place = start + np.arange(tokens)
    plan = PrefillPlan(
        tables=jnp.asarray(table[None]),
        starts=jnp.asarray([start]),
        lengths=jnp.asarray([start + tokens]),
        pages=jnp.asarray(table[place // PAGE][None]),
        offsets=jnp.asarray(place % PAGE)[None],
    )
    out, cache = backend.prefill(plan, cache, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    return q[0], k[0], v[0], np.asarray(out[0]), cache


@pytest.mark.parametrize("in_flight", [64, 2048])
@pytest.mark.parametrize("tokens", [1, 3, 4, 17, 64])
def test_prefill_is_causal_attention(in_flight: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    q, k, v, out, _ = prefilled(XlaAttention(in_flight), rng, tables(rng, 1)[0], tokens)
    expected = np.stack([dense(q[i], k[: i + 1], v[: i + 1]) for i in range(tokens)])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_a_later_chunk_sees_the_earlier_ones() -> None:
    rng = np.random.default_rng(1)
    table, backend = tables(rng, 1)[0], XlaAttention()
    _, k0, v0, _, cache = prefilled(backend, rng, table, 21)
    q, k, v, out, _ = prefilled(backend, rng, table, 9, start=21, cache=cache)
    k, v = np.concatenate([k0, k]), np.concatenate([v0, v])
    expected = np.stack([dense(q[i], k[: 22 + i], v[: 22 + i]) for i in range(9)])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("in_flight", [64, 2048])
def test_decode_rows_of_different_lengths(in_flight: int) -> None:
    rng = np.random.default_rng(2)
    backend, table = XlaAttention(in_flight), tables(rng, 3)
    cache, seen = backend.allocate(CONFIG, PAGES, PAGE, jnp.float32)[0], []
    for row, tokens in enumerate((1, 30, 63)):
        _, k, v, _, cache = prefilled(backend, rng, table[row], tokens, cache=cache)
        seen.append((k, v))
    q, k, v = (random(rng, 3, heads, CONFIG.head_dim) for heads in (6, 2, 2))
    position = np.asarray([1, 30, 63])
    plan = DecodePlan(
        tables=jnp.asarray(table),
        lengths=jnp.asarray(position + 1),
        pages=jnp.asarray(table[np.arange(3), position // PAGE]),
        offsets=jnp.asarray(position % PAGE),
    )
    out, _ = backend.decode(plan, cache, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    for row in range(3):
        keys, values = (np.concatenate([old, new[row : row + 1]]) for old, new in zip(seen[row], (k, v)))
        np.testing.assert_allclose(out[row], dense(q[row], keys, values), rtol=2e-5, atol=2e-6)


def test_a_page_out_of_range_is_not_written() -> None:
    backend = XlaAttention()
    cache = backend.allocate(CONFIG, PAGES, PAGE, jnp.float32)[0]
    ones = jnp.ones((1, 2, CONFIG.head_dim))
    plan = DecodePlan(
        tables=jnp.full((1, WIDTH), PAGES - 1),
        lengths=jnp.asarray([0]),
        pages=jnp.asarray([PAGES]),
        offsets=jnp.asarray([0]),
    )
    out, cache = backend.decode(plan, cache, jnp.ones((1, 6, CONFIG.head_dim)), ones, ones)
    assert not np.asarray(cache.k).any()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("dtype", [jnp.dtype(jnp.float32), BITS])
def test_scrub_clears_only_what_is_not_finite(dtype: Any) -> None:
    backend = XlaAttention()
    cache = backend.allocate(CONFIG, PAGES, PAGE, dtype)[0]
    nan, five, inf = (held(jnp.float32(x), dtype) for x in (np.nan, 5.0, np.inf))
    cache = type(cache)(cache.k.at[3, 0, 0].set(nan).at[3, 1, 1].set(five), cache.v.at[4].set(inf))
    cache = backend.scrub(cache, jnp.asarray([3, PAGES + 1]))
    k, v = (np.asarray(numbers(part), np.float32) for part in cache[:2])
    assert k[3, 0, 0].tolist() == [0.0] * 8
    assert k[3, 1, 1].tolist() == [5.0] * 8
    assert np.isinf(v[4]).all()


@pytest.mark.parametrize("able", [False, True])
def test_bits_hold_what_bfloat16_does_and_give_the_same_output(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(platform, "multiplies_bfloat16", lambda: able)
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(random(rng, 1, 23, heads, CONFIG.head_dim), jnp.bfloat16) for heads in (6, 2, 2))
    table, place = jnp.asarray(tables(rng, 1)), np.arange(23)
    pages = table[:, place // PAGE]
    starts, lengths, offsets = jnp.asarray([0]), jnp.asarray([23]), jnp.asarray([place % PAGE])
    plan, found = PrefillPlan(table, starts, lengths, pages, offsets), {}
    for dtype in (jnp.dtype(jnp.bfloat16), BITS):
        (empty,) = XlaAttention().allocate(CONFIG, PAGES, PAGE, dtype)
        out, cache = XlaAttention().prefill(plan, empty, q, k, v)
        assert (out.dtype, cache.k.dtype) == (jnp.bfloat16, dtype)
        found[dtype] = np.asarray(out, np.float32), np.asarray(numbers(cache.k), np.float32)
    (plain, kept), (imitated, bits) = found.values()
    np.testing.assert_array_equal(kept, bits)
    np.testing.assert_allclose(imitated, plain, atol=2e-2 if not able else 0)

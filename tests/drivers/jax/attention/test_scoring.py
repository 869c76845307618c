"""Sliding windows, soft caps and scales of the XLA backend, for prompts and for batches of unlike length."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan, Scoring
from llmos.drivers.jax.attention.xla import XlaAttention

PAGE, WIDTH, SIZE = 4, 16, 8
LENGTHS = (61, 3, 30, 0)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, scoring: Scoring) -> np.ndarray:
    """One query [heads, size] over all k and v [tokens, heads, size] that it may see."""
    k, v = k[-scoring.window :], v[-scoring.window :]
    scores = np.einsum("hd,thd->ht", q, k) * (scoring.scale or SIZE**-0.5)
    if scoring.cap:
        scores = np.tanh(scores / scoring.cap) * scoring.cap
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "scoring", [Scoring(window=5), Scoring(window=17, cap=2.0, scale=0.5), Scoring(cap=1.5)]
)
def test_decode_and_prefill_score_as_dense_attention_does(scoring: Scoring) -> None:
    rng = np.random.default_rng(0)
    rows, backend = len(LENGTHS), XlaAttention(tokens_in_flight=64)
    k, v = rng.standard_normal((2, rows, WIDTH * PAGE, 2, SIZE)).astype(np.float32)
    table = rng.permutation(rows * WIDTH).reshape(rows, WIDTH)
    pages = np.zeros((2, rows * WIDTH + 1, 2, PAGE, SIZE), np.float32)
    for part, values in zip(pages, (k, v)):
        part[table] = values.reshape(rows, WIDTH, PAGE, 2, SIZE).transpose(0, 1, 3, 2, 4)
    cache, tables = PagedCache(*map(jnp.asarray, pages)), jnp.asarray(table, jnp.int32)

    q = rng.standard_normal((rows, 2, SIZE)).astype(np.float32)
    lengths = jnp.asarray(LENGTHS)
    at = jnp.maximum(lengths - 1, 0)
    last_k, last_v = (jnp.asarray(x[np.arange(rows), at]) for x in (k, v))
    where = jnp.where(lengths > 0, tables[jnp.arange(rows), at // PAGE], rows * WIDTH + 1)
    out, _ = backend.decode(
        DecodePlan(tables, lengths, where, at % PAGE), cache, jnp.asarray(q), last_k, last_v, scoring
    )
    for row, length in enumerate(LENGTHS[:3]):
        expected = dense(q[row], k[row, :length], v[row, :length], scoring)
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-6)

    start, count = 40, 20
    queries = rng.standard_normal((1, count, 2, SIZE)).astype(np.float32)
    place = start + np.arange(count)
    plan = PrefillPlan(
        tables=tables[:1],
        starts=jnp.asarray([start]),
        lengths=jnp.asarray([start + count]),
        pages=tables[:1, place // PAGE],
        offsets=jnp.asarray(place % PAGE)[None],
    )
    new_k, new_v = (jnp.asarray(x[:1, place]) for x in (k, v))
    out, _ = backend.prefill(plan, cache, jnp.asarray(queries), new_k, new_v, scoring=scoring)
    for index, position in enumerate(place):
        expected = dense(queries[0, index], k[0, : position + 1], v[0, : position + 1], scoring)
        np.testing.assert_allclose(out[0, index], expected, rtol=2e-5, atol=2e-6)

"""The kernel that turns, writes and attends, in interpret mode, against the XLA backend that does it apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention import DecodePlan, Scoring
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.turning import suits, turned_attention
from llmos.drivers.jax.attention.xla import PagedCache, XlaAttention
from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.rope import rotation

TOKENS, WIDTH = 16, 8
LENGTHS = np.asarray([1, 16, 17, 128, 0, 50])
"""A first token; one that fills a page and one that opens the next; a full table; a row that is not live."""
PAGES = len(LENGTHS) * WIDTH + 1
Case = tuple[DecodePlan, Any, Projected]


def case(
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 64,
    rotary: int = 64,
    dtype: Any = jnp.float32,
    kv: Any = None,
) -> Case:
    """Rows whose pages lie scattered; what a row that is not live writes is dropped."""
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    tables = jnp.asarray(rng.permutation(PAGES - 1).reshape(-1, WIDTH), jnp.int32)
    at = jnp.maximum(lengths - 1, 0)
    pages = jnp.take_along_axis(tables, at[:, None] // TOKENS, axis=1)[:, 0]
    plan = DecodePlan(tables, lengths, jnp.where(lengths > 0, pages, PAGES), at % TOKENS)
    shape = (PAGES, kv_heads, TOKENS, size)
    cache = PagedCache(*(jnp.asarray(rng.normal(size=shape), kv or dtype) for _ in range(2)))
    fused = jnp.asarray(rng.normal(size=(len(LENGTHS), heads + 2 * kv_heads, size)), dtype)
    inverse = (1e4 ** -np.linspace(0, 1, rotary // 2)).astype(np.float32)
    return plan, cache, Projected(fused, *rotation(at, inverse, scale=1.2), kv_heads)


def compare(found: tuple[Any, Any], expected: tuple[Any, Any], atol: float = 2e-6) -> None:
    """Outputs of rows that live, and zeros of the other; keys but for their rounding, values exactly."""
    (out, *pages), (wanted, *reference) = ([np.asarray(x, np.float32) for x in jax.tree.leaves(each)] for each in (found, expected))  # fmt: skip
    live = LENGTHS > 0
    np.testing.assert_allclose(out[live], wanted[live], atol=atol)
    assert not out[~live].any()
    for part, other in zip(pages, reference, strict=True):
        np.testing.assert_allclose(part, other, atol=atol)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_rows_write_their_new_token_and_attend_as_on_the_other_backend(splits: int) -> None:
    plan, cache, new = case()
    found = turned_attention(plan, cache, new, splits=splits, interpret=True)
    compare(found, XlaAttention().step(plan, cache, new))
    changed = np.flatnonzero((np.asarray(found[1].v) != np.asarray(cache.v)).any(axis=(1, 2, 3)))
    assert set(changed) == set(plan.pages.tolist()) - {PAGES}


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(window=1),
        Scoring(window=5),
        Scoring(window=TOKENS + 1, cap=2.0, scale=0.5),
        Scoring(cap=1.5),
        Scoring(scale=0.3),
    ],
)
def test_windows_caps_and_scales_are_those_of_the_other_backend(scoring: Scoring, splits: int) -> None:
    plan, cache, new = case(kv_heads=3)
    found = turned_attention(plan, cache, new, scoring=scoring, splits=splits, interpret=True)
    compare(found, XlaAttention().step(plan, cache, new, scoring))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotary"),
    [(8, 1, 128, 128), (5, 5, 80, 32), (6, 2, 24, 24), (20, 1, 96, 72), (2, 2, 64, 2)],
)
def test_heads_groups_and_what_is_turned_of_a_head_may_have_any_size(
    heads: int, kv_heads: int, size: int, rotary: int
) -> None:
    plan, cache, new = case(heads, kv_heads, size, rotary)
    compare(turned_attention(plan, cache, new, interpret=True), XlaAttention().step(plan, cache, new))


@pytest.mark.parametrize("kv", ["bfloat16", "float32"])
def test_bfloat16_is_rounded_where_the_other_backend_rounds(kv: str) -> None:
    plan, cache, new = case(dtype=jnp.bfloat16, kv=jnp.dtype(kv))
    out, written = turned_attention(plan, cache, new, interpret=True)
    expected, reference = XlaAttention().step(plan, cache, new)
    compare((out, ()), (expected, ()), atol=0.02)
    np.testing.assert_array_equal(written.v, reference.v)
    # A number whose float32 lies between two of bfloat16 may fall to either side.
    differ = np.asarray(written.k, np.float32) != np.asarray(reference.k, np.float32)
    assert differ.sum() <= 0.01 * np.count_nonzero(np.asarray(cache.v != reference.v))
    np.testing.assert_allclose(*(np.asarray(x.k, np.float32) for x in (written, reference)), rtol=0.01)


def test_pages_that_the_queries_do_not_see_are_not_read_nor_what_a_page_held_before() -> None:
    plan, cache, new = case()
    scoring = Scoring(window=TOKENS)
    spoilt = cache.k.at[plan.tables[3, :6]].set(jnp.nan)
    spoilt = spoilt.at[plan.pages, :, plan.offsets].set(jnp.nan, mode="drop")
    out, _ = turned_attention(plan, PagedCache(spoilt, cache.v), new, scoring=scoring, interpret=True)
    expected, _ = turned_attention(plan, cache, new, scoring=scoring, interpret=True)
    np.testing.assert_array_equal(out, expected)

"""The GPU's decode kernel, in interpret mode, against the XLA backend; selecting a backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.paged import paged_attention, split_count, tiling
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.selection import select
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument

PAGE_TOKENS, PAGES, WIDTH = 16, 64, 8


def arrays(
    rows: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, queries: int = 1
) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(rows, queries, heads, head_dim)), jnp.float32)
    shape = (PAGES, kv_heads, PAGE_TOKENS, head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    tables = jnp.asarray(rng.permutation(PAGES)[: rows * WIDTH].reshape(rows, WIDTH), jnp.int32)
    return q, k, v, tables


@pytest.mark.parametrize("splits", [1, 4])
def test_ragged_rows_attend_to_their_own_pages(splits: int) -> None:
    q, k, v, tables = arrays(4)
    lengths = jnp.asarray([1, 16, 17, 128], jnp.int32)
    out = paged_attention(q, PagedCache(k, v), tables, lengths, splits=splits, interpret=True)
    expected = XlaAttention().attend(tables, lengths, lengths, PagedCache(k, v), q)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("queries", [2, 11])
def test_the_tokens_of_a_row_share_its_pages_and_see_what_is_before_them(queries: int, splits: int) -> None:
    q, k, v, tables = arrays(4, queries=queries)
    starts = jnp.asarray([0, 15, 16, 128 - queries], jnp.int32)
    lengths = starts + queries
    cache = PagedCache(k, v)
    out = paged_attention(q, cache, tables, lengths, starts + 1, splits=splits, interpret=True)
    expected = XlaAttention().attend(tables, lengths, starts + 1, PagedCache(k, v), q)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_guesses_are_verified_as_on_the_other_backend() -> None:
    q, k, v, tables = arrays(3, queries=4)
    rng = np.random.default_rng(1)
    new_k, new_v = (jnp.asarray(rng.normal(size=(3, 4, 2, 32)), jnp.float32) for _ in range(2))
    starts, counts = jnp.asarray([14, 40, 0], jnp.int32), jnp.asarray([4, 2, 0], jnp.int32)
    position = starts[:, None] + jnp.arange(4)
    pages = jnp.take_along_axis(tables, position // PAGE_TOKENS, axis=1)
    pages = jnp.where(jnp.arange(4) < counts[:, None], pages, PAGES)
    lengths = jnp.where(counts > 0, starts + counts, 0)
    plan = VerifyPlan(tables, starts, lengths, pages, position % PAGE_TOKENS)
    out, cache = PallasAttention(interpret=True).verify(plan, PagedCache(k, v), q, new_k, new_v)
    expected, reference = XlaAttention().verify(plan, PagedCache(k, v), q, new_k, new_v)
    np.testing.assert_array_equal(cache.k, reference.k)
    np.testing.assert_array_equal(cache.v, reference.v)
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(out[row, :count], expected[row, :count], atol=2e-6)


@pytest.mark.parametrize("chunk", [8, 40, 64])
def test_a_fresh_prompt_is_written_page_by_page_as_it_is_token_by_token(chunk: int) -> None:
    rng = np.random.default_rng(1)
    _, k, v, tables = arrays(2)
    q, new_k, new_v = (jnp.asarray(rng.normal(size=(2, chunk, 2, 32)), jnp.float32) for _ in range(3))
    counts = jnp.asarray([chunk, chunk // 2], jnp.int32)
    offset = jnp.arange(chunk)
    pages = jnp.where(offset < counts[:, None], tables[:, offset // PAGE_TOKENS], PAGES)
    plan = PrefillPlan(tables, jnp.zeros(2, jnp.int32), counts, pages, jnp.tile(offset % PAGE_TOKENS, (2, 1)))
    q = jnp.concatenate([q, q], axis=2)
    out, cache = PallasAttention(fresh="xla").prefill(plan, PagedCache(k, v), q, new_k, new_v, fresh=True)
    expected, reference = XlaAttention().prefill(plan, PagedCache(k, v), q, new_k, new_v)
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(out[row, :count], expected[row, :count], atol=2e-6)
        for at in range(count):
            where = (tables[row, at // PAGE_TOKENS], slice(None), at % PAGE_TOKENS)
            np.testing.assert_array_equal(cache.k[where], reference.k[where])
            np.testing.assert_array_equal(cache.v[where], reference.v[where])


SCORINGS = [
    Scoring(window=5),
    Scoring(window=40, cap=2.0, scale=0.5),
    Scoring(cap=1.5),
    Scoring(scale=0.3),
]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("queries", "splits"), [(1, 1), (6, 4)])
def test_windows_caps_and_scales_are_those_of_the_other_backend(
    queries: int, scoring: Scoring, splits: int
) -> None:
    q, k, v, tables = arrays(4, heads=6, queries=queries)
    starts = jnp.asarray([0, 15, 50, 128 - queries], jnp.int32)
    lengths = starts + queries
    cache = PagedCache(k, v)
    out = paged_attention(
        q, cache, tables, lengths, starts + 1, scoring=scoring, splits=splits, interpret=True
    )
    expected = XlaAttention().attend(tables, lengths, starts + 1, cache, q, scoring)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_pages_before_the_window_are_not_read() -> None:
    q, k, v, tables = arrays(1)
    spoilt = k.at[tables[0, :6]].set(jnp.nan)
    lengths, scoring = jnp.asarray([128], jnp.int32), Scoring(window=2 * PAGE_TOKENS)
    out = paged_attention(q, PagedCache(spoilt, v), tables, lengths, scoring=scoring, interpret=True)
    expected = paged_attention(q, PagedCache(k, v), tables, lengths, scoring=scoring, interpret=True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (20, 1, 80)])
def test_heads_and_groups_need_not_be_powers_of_two(heads: int, kv_heads: int, head_dim: int) -> None:
    q, k, v, tables = arrays(2, heads, kv_heads, head_dim, queries=3)
    starts = jnp.asarray([1, 120], jnp.int32)
    cache = PagedCache(k, v)
    out = paged_attention(q, cache, tables, starts + 3, starts + 1, interpret=True)
    expected = XlaAttention().attend(tables, starts + 3, starts + 1, cache, q)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def prefill_plan(tables: Any, starts: Any, counts: Any, chunk: int) -> PrefillPlan:
    position = starts[:, None] + jnp.arange(chunk)
    column = jnp.minimum(position // PAGE_TOKENS, WIDTH - 1)
    pages = jnp.take_along_axis(tables, column, axis=1)
    pages = jnp.where(jnp.arange(chunk) < counts[:, None], pages, PAGES)
    return PrefillPlan(tables, starts, starts + counts, pages, position % PAGE_TOKENS)


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=33), Scoring(window=33, cap=2.0, scale=0.5)])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_chunk_attends_as_on_the_other_backend(fresh: bool, scoring: Scoring) -> None:
    chunk, rng = 70, np.random.default_rng(1)
    _, k, v, tables = arrays(3)
    starts = jnp.asarray([0, 0, 0] if fresh else [20, 0, 58], jnp.int32)
    counts = jnp.asarray([70, 1, 69], jnp.int32)
    q, new_k, new_v = (jnp.asarray(rng.normal(size=(3, chunk, n, 32)), jnp.float32) for n in (4, 2, 2))
    plan = prefill_plan(tables, starts, counts, chunk)
    backend = PallasAttention(fresh="xla", interpret=True)
    out, cache = backend.prefill(plan, PagedCache(k, v), q, new_k, new_v, fresh=fresh, scoring=scoring)
    expected, reference = XlaAttention().prefill(plan, PagedCache(k, v), q, new_k, new_v, scoring=scoring)
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(out[row, :count], expected[row, :count], atol=2e-6)
    if not fresh:
        np.testing.assert_array_equal(cache.k, reference.k)


def test_a_chunk_is_cut_into_blocks_of_queries_that_fit_into_registers() -> None:
    tile = tiling(2048, 4, 128, 1, Scoring())
    assert (tile.rows, tile.queries) == (128, 32)
    assert tiling(2048, 2, 256, 1, Scoring()).queries == 32
    assert tiling(1, 4, 128, 1, Scoring()).rows == 16
    assert tiling(5, 71, 64, 1, Scoring()).queries == 3


def test_decode_writes_the_new_token_and_sees_it() -> None:
    q, k, v, tables = arrays(2)
    new_k, new_v = (jnp.full((2, 2, 32), value, jnp.float32) for value in (0.5, 2.0))
    plan = DecodePlan(tables, jnp.asarray([1, 0]), jnp.asarray([tables[0, 0], PAGES]), jnp.asarray([0, 0]))
    out, cache = PallasAttention(interpret=True).decode(plan, PagedCache(k, v), q[:, 0], new_k, new_v)
    np.testing.assert_allclose(out[0], 2.0, rtol=1e-6)
    assert not np.asarray(out[1]).any()
    np.testing.assert_array_equal(cache.k[tables[0, 0], :, 0], new_k[0])


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=40, cap=50.0, scale=0.1)])
@pytest.mark.parametrize(("heads", "head_dim", "queries"), [(4, 128, 1), (6, 96, 5), (4, 256, 200)])
def test_the_kernel_can_be_lowered_for_a_gpu(
    heads: int, head_dim: int, queries: int, scoring: Scoring
) -> None:
    shapes = [(2, queries, heads, head_dim), (PAGES, 2, PAGE_TOKENS, head_dim)]
    q, kv = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    tables, lengths = jnp.zeros((2, WIDTH), jnp.int32), jnp.zeros(2, jnp.int32)
    run = partial(paged_attention, scoring=scoring)
    traced = jax.jit(run).trace(q, PagedCache(kv, kv), tables, lengths, lengths)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "paged_attention" in text
    assert "stablehlo.pad" not in text
    assert "stablehlo.slice" not in text


def test_a_row_that_is_not_live_gives_zero() -> None:
    q, k, v, tables = arrays(1)
    out = paged_attention(q, PagedCache(k, v), tables, jnp.zeros(1, jnp.int32), splits=2, interpret=True)
    assert not np.asarray(out).any()


def test_shapes_that_do_not_fit_are_refused_before_the_kernel_runs() -> None:
    q, k, v, tables = arrays(2)
    with pytest.raises(ValueError, match=r"lengths \(3,\)"):
        paged_attention(q, PagedCache(k, v), tables, jnp.zeros(3, jnp.int32))


def test_few_rows_are_split_and_many_are_not() -> None:
    assert split_count(256, 8, 64) == 1
    assert split_count(1, 8, 64) == 64
    assert split_count(1, 8, 4) == 4


def config(head_dim: int = 64) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=8, hidden=64, layers=1, heads=1, kv_heads=1, head_dim=head_dim, intermediate=8,
        norm_eps=1e-5, rope_theta=1e4, max_positions=64,
    )  # fmt: skip


def test_the_backend_follows_device_and_shape() -> None:
    request = LoadRequest(model="m", source="", dtype="bfloat16", page_tokens=64)
    assert select("auto", "cpu", config(), request).name == "xla"
    assert select("auto", "gpu", config(), request).name == "pallas+cudnn"
    assert select("auto", "gpu", config(head_dim=80), request).name == "pallas+cudnn"
    assert select("xla", "gpu", config(), request).name == "xla"
    with pytest.raises(InvalidArgument, match="needs a GPU, here is cpu"):
        select("pallas", "cpu", config(), request)
    with pytest.raises(InvalidArgument, match="there is: auto, native, pallas, tpu, xla"):
        select("magic", "gpu", config(), request)


def test_a_gpu_that_gets_the_slower_backend_says_why() -> None:
    wide = LoadRequest(model="m", source="", dtype="float32", page_tokens=64)
    assert "needs dtype bfloat16, asked for is float32" in select("auto", "gpu", config(), wide).name
    odd = LoadRequest(model="m", source="", dtype="bfloat16", page_tokens=48)
    assert "power of two from 16 on, asked for is 48" in select("auto", "gpu", config(), odd).name

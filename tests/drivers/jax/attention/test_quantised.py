"""8-bit pages: near float pages in every backend, with the page as the first axis of every array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.attention.caches import PagedCache, packed
from llmos.drivers.jax.attention.paged import paged_attention
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan, Scoring
from llmos.drivers.jax.attention.selection import page_bytes
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig

PAGE, PAGES, WIDTH, SIZE = 16, 33, 8, 32
CONFIG = DecoderConfig(
    vocab_size=8, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=SIZE, intermediate=8, norm_eps=1e-5,
    rope_theta=1e4, max_positions=64,
)  # fmt: skip
KINDS = list(quant.DTYPES)
NEAR = {"int8": 0.02, "float8": 0.08}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pages(kind: str) -> tuple[PagedCache, PagedCache, jax.Array]:
    """Float pages whose tokens differ in size, the same in 8 bits, and four rows' tables."""
    sizes = 10.0 ** (normal(PAGES, 2, PAGE, 1, seed=3) / 2)
    whole = PagedCache(normal(PAGES, 2, PAGE, SIZE), normal(PAGES, 2, PAGE, SIZE, seed=1) * sizes)
    empty = XlaAttention().allocate(CONFIG, PAGES, PAGE, quant.DTYPES[kind])[0]
    tables = np.random.default_rng(2).permutation(PAGES - 1).reshape(4, WIDTH)
    return whole, packed(empty, whole.k, whole.v), jnp.asarray(tables, jnp.int32)


def plan(tables: jax.Array, lengths: jax.Array) -> DecodePlan:
    at = lengths - 1
    return DecodePlan(tables, lengths, tables[jnp.arange(4), at // PAGE], at % PAGE)


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=20, cap=5.0)], ids=["plain", "windowed"])
@pytest.mark.parametrize("kind", KINDS)
def test_xla_attends_to_8_bit_pages_as_to_float_ones(kind: str, scoring: Scoring) -> None:
    whole, small, tables = pages(kind)
    lengths = jnp.asarray([1, 16, 17, 128], jnp.int32)
    new = normal(4, 4, SIZE, seed=5), normal(4, 2, SIZE, seed=6), normal(4, 2, SIZE, seed=7)
    backend = XlaAttention(tokens_in_flight=64)
    expected, _ = backend.decode(plan(tables, lengths), whole, *new, scoring)
    out, cache = backend.decode(plan(tables, lengths), small, *new, scoring)
    assert [x.dtype for x in jax.tree.leaves(cache)] == [x.dtype for x in jax.tree.leaves(small)]
    np.testing.assert_allclose(out, expected, atol=NEAR[kind] * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_equals_xla_on_8_bit_pages(kind: str, splits: int) -> None:
    _, small, tables = pages(kind)
    q, lengths = normal(4, 4, SIZE, seed=5), jnp.asarray([1, 16, 17, 128], jnp.int32)
    out = paged_attention(q[:, None], small, tables, lengths, splits=splits, interpret=True)[:, 0]
    expected = XlaAttention().attend(tables, lengths, lengths, small, q[:, None])[:, 0]
    np.testing.assert_allclose(out, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_can_be_lowered_for_a_gpu(kind: str) -> None:
    _, small, tables = pages(kind)

    def run(q: jax.Array, cache: PagedCache) -> jax.Array:
        return paged_attention(q, cache, tables, jnp.ones(4, jnp.int32), splits=2)

    traced = jax.jit(run).trace(normal(4, 1, 4, SIZE).astype(jnp.bfloat16), small)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "paged_attention" in text
    assert {"int8": "xi8>", "float8": "xf8E4M3FN>"}[kind] in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_prompt_is_written_page_by_page_as_it_is_token_by_token(kind: str) -> None:
    _, small, tables = pages(kind)
    chunk, counts = 40, jnp.asarray([40, 21, 0, 1], jnp.int32)
    q, k, v = normal(4, chunk, 4, SIZE), normal(4, chunk, 2, SIZE, seed=1), normal(4, chunk, 2, SIZE, seed=2)
    offset = jnp.arange(chunk)
    where = jnp.where(offset < counts[:, None], tables[:, offset // PAGE], PAGES)
    prefill = PrefillPlan(tables, jnp.zeros(4, jnp.int32), counts, where, jnp.tile(offset % PAGE, (4, 1)))
    out, cache = PallasAttention(fresh="xla").prefill(prefill, small, q, k, v, fresh=True)
    expected, reference = XlaAttention().prefill(prefill, small, q, k, v)
    for row, count in enumerate(counts.tolist()):
        near = NEAR[kind] * float(jnp.abs(expected).max())
        np.testing.assert_allclose(out[row, :count], expected[row, :count], atol=near)
        for at in range(count):
            place = (tables[row, at // PAGE], slice(None), at % PAGE)
            for parts in zip(jax.tree.leaves(cache), jax.tree.leaves(reference), strict=True):
                found, wanted = (np.asarray(x[place], np.float32) for x in parts)
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_scrub_clears_values_and_scales_that_are_not_finite(kind: str) -> None:
    _, small, _ = pages(kind)
    assert small.k_scale is not None
    bad = small._replace(k_scale=small.k_scale.at[3, 0, 2].set(np.nan))
    if kind == "float8":
        bad = bad._replace(v=bad.v.at[3, 1, 1].set(jnp.nan))
    sound = XlaAttention().scrub(bad, jnp.asarray([3, PAGES + 1]))
    assert sound.k_scale is not None
    assert float(sound.k_scale[3, 0, 2]) == 0.0
    assert all(np.isfinite(np.asarray(part, np.float32)).all() for part in sound)
    np.testing.assert_array_equal(sound.k_scale[4], small.k_scale[4])


def test_a_page_is_half_as_large_and_its_scales() -> None:
    assert page_bytes(CONFIG, 64, jnp.bfloat16) == 64 * 2 * 2 * SIZE * 2
    assert page_bytes(CONFIG, 64, jnp.int8) == page_bytes(CONFIG, 64, jnp.float8_e4m3fn)
    assert page_bytes(CONFIG, 64, jnp.int8) == 64 * 2 * 2 * (SIZE + 4)

"""The kernel that turns, writes and attends, in interpret mode, against XLA that does it apart."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import DecodePlan, Scoring
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.turning import turned_attention
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.layers import RMSNorm
from llmos.drivers.jax.decoder.modules import Decoder, random
from llmos.drivers.jax.decoder.rope import Turn, rotation
from llmos.drivers.jax.execution.state import empty_state
from llmos.drivers.jax.sharding.collectives import Columns

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
    return plan, cache, Projected(fused, rotation(at, inverse, scale=1.2), kv_heads)


def compare(found: tuple[Any, Any], expected: tuple[Any, Any], atol: float = 2e-6) -> None:
    """Outputs of rows that live, and zeros of the other; pages but for the rounding of what is turned."""
    out, wanted = (np.asarray(each[0], np.float32) for each in (found, expected))
    live = LENGTHS > 0
    np.testing.assert_allclose(out[live], wanted[live], atol=atol)
    assert not out[~live].any()
    for part, other in zip(*(jax.tree.leaves(each[1]) for each in (found, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(part, np.float32), np.asarray(other, np.float32), atol=atol)


@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_rows_write_their_new_token_and_attend_as_on_the_other_backend(splits: int) -> None:
    plan, cache, new = case()
    found = turned_attention(plan, cache, new, splits=splits, interpret=True)
    compare(found, XlaAttention().step(plan, cache, new))
    changed = np.flatnonzero((np.asarray(found[1].v) != np.asarray(cache.v)).any(axis=(1, 2, 3)))
    assert set(changed) == set(plan.pages.tolist()) - {PAGES}


@pytest.mark.parametrize(
    ("scoring", "splits"),
    [
        (Scoring(window=1), 4),
        (Scoring(window=5), 1),
        (Scoring(window=TOKENS + 1, cap=2.0, scale=0.5), 2),
        pytest.param(Scoring(cap=1.5), 4, marks=pytest.mark.slow),
    ],
)
def test_windows_caps_and_scales_are_those_of_the_other_backend(scoring: Scoring, splits: int) -> None:
    plan, cache, new = case(kv_heads=3)
    found = turned_attention(plan, cache, new, scoring=scoring, splits=splits, interpret=True)
    compare(found, XlaAttention().step(plan, cache, new, scoring))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotary"),
    [(8, 1, 128, 128), pytest.param(5, 5, 80, 32, marks=pytest.mark.slow), (20, 1, 24, 18)],
)
def test_heads_groups_and_what_is_turned_of_a_head_may_have_any_size(
    heads: int, kv_heads: int, size: int, rotary: int
) -> None:
    plan, cache, new = case(heads, kv_heads, size, rotary)
    compare(turned_attention(plan, cache, new, interpret=True), XlaAttention().step(plan, cache, new))


@pytest.mark.parametrize(("unit", "rotary"), [(True, 24), (False, 80)])
def test_queries_and_keys_are_normed_before_they_are_turned(unit: bool, rotary: int) -> None:
    plan, cache, new = case(kv_heads=3, size=80, rotary=rotary)
    scales = iter(np.random.default_rng(1).normal(size=(2, 80)))
    q, k = (RMSNorm(80, 0.5, lambda _: jnp.asarray(next(scales), jnp.float32), unit) for _ in range(2))
    new = replace(new, norms=(q, k))
    expected = XlaAttention().decode(plan, cache, *new.parts())
    compare(turned_attention(plan, cache, new, splits=2, interpret=True), expected)
    plain = turned_attention(plan, cache, replace(new, norms=None), splits=2, interpret=True)
    assert np.abs(plain[0] - expected[0]).max() > 0.1


@pytest.mark.parametrize("kv", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_bfloat16_is_rounded_where_the_other_backend_rounds(kv: str) -> None:
    plan, cache, new = case(dtype=jnp.bfloat16, kv=jnp.dtype(kv))
    found = turned_attention(plan, cache, new, interpret=True)
    expected = XlaAttention().step(plan, cache, new)
    compare((found[0], ()), (expected[0], ()), atol=0.02)
    pages, wanted = (jax.tree.map(lambda x: np.asarray(x, np.float32), each[1]) for each in (found, expected))
    np.testing.assert_array_equal(pages.v, wanted.v)
    # A key between two numbers of bfloat16 may fall to either.
    np.testing.assert_allclose(pages.k, wanted.k, rtol=0.01)


def test_pages_that_the_queries_do_not_see_are_not_read_nor_what_a_page_held_before() -> None:
    plan, cache, new = case()
    scoring = Scoring(window=TOKENS)
    spoilt = cache.k.at[plan.tables[3, :6]].set(jnp.nan)
    spoilt = spoilt.at[plan.pages, :, plan.offsets].set(jnp.nan, mode="drop")
    out, _ = turned_attention(plan, PagedCache(spoilt, cache.v), new, scoring=scoring, interpret=True)
    expected, _ = turned_attention(plan, cache, new, scoring=scoring, interpret=True)
    np.testing.assert_array_equal(out, expected)


CONFIG = DecoderConfig(
    vocab_size=97, hidden=32, layers=2, heads=6, kv_heads=2, head_dim=16, intermediate=48, norm_eps=1e-5,
    rope_theta=1e4, max_positions=128, rotary=8, windows=(5, 0), attention_cap=5.0, qk_norm=True,
)  # fmt: skip


def generate(backend: AttentionBackend, steps: int) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens [steps, 3] of two rows that live and one that does not, and the last logits."""
    graph, tree = nnx.split(Decoder(CONFIG, random(jnp.float32, 0)))
    weights, structure = jax.tree.flatten(tree)
    shape = forward.Shape(graph, structure, backend, TOKENS, 7, Columns(CONFIG.vocab_size))
    caches = backend.allocate(CONFIG, 7, TOKENS, jnp.float32)
    state = empty_state(2, 4, 6)._replace(
        token=jnp.asarray([5, 17, 0]),
        length=jnp.asarray([1, 1, 0]),
        live=jnp.asarray([True, True, False]),
        tables=jnp.asarray([[3, 1, 6, 6], [0, 4, 6, 6], [6, 6, 6, 6]]),
    )
    step, tokens = jax.jit(partial(forward.decode, shape), donate_argnums=1), []
    for _ in range(steps):
        caches, logits = step(weights, caches, state, jnp.arange(3))
        state = state._replace(token=logits.argmax(axis=-1), length=state.length + state.live)
        tokens.append(state.token.tolist()[:2])
    return tokens, np.asarray(logits)[:2]


def test_a_model_decodes_the_tokens_that_it_does_on_the_other_backend() -> None:
    tokens, logits = generate(PallasAttention(interpret=True), TOKENS + 4)
    expected, wanted = generate(XlaAttention(), TOKENS + 4)
    assert tokens == expected
    assert len({token for row in tokens for token in row}) > 3
    np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_devices_that_share_the_heads_each_run_the_kernel() -> None:
    plan, cache, new = case(heads=4)
    expected = XlaAttention().step(plan, cache, new)
    q, k, v = jnp.split(new.fused, [4, 6], axis=1)
    fused = jnp.concatenate([q[:, :2], k[:, :1], v[:, :1], q[:, 2:], k[:, 1:], v[:, 1:]], axis=1)
    heads = PartitionSpec(None, "model")

    def part(plan: DecodePlan, cache: PagedCache, fused: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
        return PallasAttention(interpret=True).step(plan, cache, Projected(fused, Turn(cos, sin), 1))

    local = jax.shard_map(
        part,
        mesh=Mesh(np.asarray(jax.devices()[:2]), ("model",)),
        in_specs=(PartitionSpec(), heads, heads, PartitionSpec(), PartitionSpec()),
        out_specs=(heads, heads),
        check_vma=False,
    )
    compare(jax.jit(local, donate_argnums=1)(plan, cache, fused, *new.turn), expected)


def test_the_kernel_can_be_lowered_for_a_gpu_and_gives_back_the_pages_in_place() -> None:
    plan, cache, new = case(8, 2, 96, 64, jnp.bfloat16)
    run = partial(turned_attention, scoring=Scoring(window=40, cap=50.0))
    traced = jax.jit(lambda *x: run(x[0], x[1], Projected(x[2], Turn(*x[3:]), new.kv_heads))).trace(
        plan, cache, new.fused, *new.turn
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "turned_attention" in text
    assert text.count("#stablehlo.output_operand_alias<") == 2
    assert "stablehlo.pad" not in text


def test_shapes_that_do_not_fit_are_refused_before_the_kernel_runs() -> None:
    plan, cache, new = case()
    with pytest.raises(ValueError, match=r"2 \* 3 of keys and values"):
        turned_attention(plan, cache, replace(new, kv_heads=3))
    with pytest.raises(ValueError, match=r"plan \[\(6, 8\), \(3,\)"):
        turned_attention(plan._replace(lengths=plan.lengths[:3]), cache, new)

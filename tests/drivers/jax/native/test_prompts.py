"""The native attention of prompts equals XLA's and NumPy's, and refuses what has other shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.jax.attention.caches import PagedCache, held, numbers
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.plans import PLAIN, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.shared import Geometry, SharedAttention, SharedCaches
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder.rope import Turn, rotate, rotation
from llmos.drivers.jax.native import build, kernels

NATIVE, XLA = NativeAttention(), XlaAttention()


def extend(
    plan: VerifyPlan,
    cache: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    turn: Turn,
    scoring: Scoring = PLAIN,
    backend: Any = NATIVE,
) -> Any:
    return backend.extend(plan, cache, Projected.of(q, k, v, turn), scoring=scoring)


@pytest.fixture(autouse=True)
def compiled(native_kernels: bool) -> None:
    if not native_kernels:
        pytest.skip(kernels.state())


@dataclass(frozen=True)
class Case:
    """Rows of which ``starts`` tokens are there and ``counts`` come, padded to ``width`` new ones."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    width: int
    kv_heads: int = 2
    group: int = 3
    size: int = 64
    page: int = 16
    turned: int = 64
    scoring: Scoring = PLAIN
    kind: str = "float32"
    kept: str = "float32"

    @property
    def used(self) -> int:
        """Pages of a row."""
        return -(-max(s + self.width for s in self.starts) // self.page)

    def random(self, seed: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def new(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        shape = (len(self.starts), self.width)
        return tuple(
            jnp.asarray(self.random(i, *shape, n, self.size), self.kind) for i, n in enumerate(heads)
        )  # type: ignore[return-value]

    def cache(self) -> PagedCache:
        """Pages in which all that no token was written to yet is not finite."""
        shape = (len(self.starts) * self.used + 1, self.kv_heads, self.page, self.size)
        dtype = jnp.uint16 if self.kept == "bfloat16" else jnp.float32
        known = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        for row, start in enumerate(self.starts):
            at = np.arange(start)
            for part, seed in zip(known, (5, 6)):
                some = self.random(seed + 2 * row, start, self.kv_heads, self.size)
                part[self.table()[row, at // self.page], :, at % self.page] = some
        return PagedCache(*(held(jnp.asarray(part), jnp.dtype(dtype)) for part in known))

    def table(self) -> np.ndarray:
        rows = len(self.starts)
        return np.random.default_rng(9).permutation(rows * self.used).reshape(rows, -1).astype(np.int32)

    def plan(self) -> VerifyPlan:
        starts, counts = np.asarray(self.starts, np.int32), np.asarray(self.counts, np.int32)
        place = starts[:, None] + np.arange(self.width)
        pages = np.take_along_axis(self.table(), place // self.page, axis=1)
        nowhere = len(self.starts) * self.used + 1
        pages = np.where(np.arange(self.width) < counts[:, None], pages, nowhere)
        lengths = np.where(counts > 0, starts + counts, 0)
        found = (self.table(), starts, lengths, pages, place % self.page)
        return VerifyPlan(*(jnp.asarray(x, jnp.int32) for x in found))

    def turn(self) -> Turn:
        place = jnp.asarray(self.starts)[:, None] + jnp.arange(self.width)
        return rotation(place, 1e4 ** -(np.arange(0, self.turned, 2, dtype=np.float32) / max(self.turned, 1)))

    def dense(self, cache: PagedCache, row: int, token: int) -> np.ndarray:
        """The output of one new token by NumPy in float64, from a cache which has been written."""
        table, position = self.table()[row], self.starts[row] + token
        oldest = max(0, position + 1 - self.scoring.window) if self.scoring.window else 0
        at = np.arange(oldest, position + 1)
        k, v = (
            np.asarray(numbers(x), np.float64)[table[at // self.page], :, at % self.page] for x in cache[:2]
        )
        q = np.asarray(rotate(self.new()[0], *self.turn()), np.float64)[row, token]
        k, v = (np.repeat(x, self.group, axis=1) for x in (k, v))
        scores = np.einsum("hd,thd->ht", q, k) * (self.scoring.scale or self.size**-0.5)
        if self.scoring.cap:
            scores = np.tanh(scores / self.scoring.cap) * self.scoring.cap
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v))

    @property
    def tolerance(self) -> float:
        return 2e-5 if self.kind == self.kept == "float32" else 3e-2


def run(case: Case) -> tuple[jax.Array, PagedCache]:
    call = jax.jit(partial(extend, scoring=case.scoring))
    out, cache = call(case.plan(), case.cache(), *case.new(), case.turn())
    return out, cache


def agrees_with_numpy(case: Case) -> None:
    out, cache = run(case)
    assert bool(jnp.isfinite(out).all())
    for row, count in enumerate(case.counts):
        for token in {0, count // 2, count - 1} if count else ():
            expected = case.dense(cache, row, token)
            np.testing.assert_allclose(np.asarray(out[row, token], np.float64), expected, atol=case.tolerance)


SCORINGS = [Scoring(), Scoring(window=5), Scoring(window=70, cap=3.0, scale=0.3), Scoring(cap=50.0)]
TYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("kind", "kept"), TYPES)
def test_it_gives_what_xla_does_and_writes_the_same_pages(scoring: Scoring, kind: str, kept: str) -> None:
    case = Case((0, 37, 4), (40, 21, 0), 40, scoring=scoring, kind=kind, kept=kept)
    out, cache = run(case)
    plan, (q, k, v), turn = case.plan(), case.new(), case.turn()
    clean = PagedCache(*(held(jnp.nan_to_num(numbers(x)), x.dtype) for x in case.cache()[:2]))
    expected, written = XLA.verify(plan, clean, rotate(q, *turn), rotate(k, *turn), v, scoring)
    for row, count in enumerate(case.counts):
        mine, theirs = (np.asarray(x[row, :count], np.float32) for x in (out, expected))
        np.testing.assert_allclose(mine, theirs, atol=case.tolerance)
    assert bool((out[2] == 0).all())
    for pages, wanted in zip(cache[:2], written[:2]):
        found = np.nan_to_num(np.asarray(numbers(pages), np.float32))
        np.testing.assert_allclose(found, np.asarray(numbers(wanted), np.float32), rtol=8e-3, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_agrees_with_numpy(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 90))
    size = data.draw(st.sampled_from([16, 64, 80, 96, 128]))
    kind, kept = data.draw(st.sampled_from(TYPES))
    agrees_with_numpy(
        Case(
            starts=tuple(data.draw(st.integers(0, 600)) for _ in range(rows)),
            counts=tuple(data.draw(st.integers(0, width)) for _ in range(rows)),
            width=width,
            kv_heads=data.draw(st.integers(1, 3)),
            group=data.draw(st.sampled_from([1, 2, 3, 4, 8])),
            size=size,
            page=data.draw(st.sampled_from([1, 4, 16, 24, 64])),
            turned=data.draw(st.sampled_from([0, size // 2, size])),
            scoring=Scoring(
                data.draw(st.sampled_from([0, 1, 7, 33, 300])), data.draw(st.sampled_from([0.0, 2.0, 30.0]))
            ),
            kind=kind,
            kept=kept,
        )
    )


def test_a_long_prompt_is_shared_among_threads_without_loss() -> None:
    case = Case((130,), (512,), 512, kv_heads=3)
    first = np.asarray(run(case)[0])
    agrees_with_numpy(case)
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run(case)[0]), first)


def test_what_is_not_finite_stays_so_in_its_own_row() -> None:
    case = Case((20, 20), (8, 8), 8)
    q, k, v = case.new()
    q = q.at[0, 3].set(jnp.nan)
    out, _ = extend(case.plan(), case.cache(), q, k, v, case.turn())
    assert bool(jnp.isnan(out[0, 3]).all())
    assert bool(jnp.isfinite(out[0, :3]).all())
    assert bool(jnp.isfinite(out[0, 4:]).all())
    assert bool(jnp.isfinite(out[1]).all())


def test_without_a_turn_heads_are_taken_as_they_are() -> None:
    case = Case((5,), (20,), 20, turned=0)
    out, _ = run(case)
    again, _ = NATIVE.prefill(case.plan(), case.cache(), *case.new())  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(out), np.asarray(again))


def test_pages_and_offsets_out_of_range_are_not_written() -> None:
    case = Case((0,), (4,), 4, page=4)
    plan, before = case.plan(), case.cache()
    for pages, offsets in (([[-1, 9, 2, -7]], [[0, 1, 2, 3]]), ([[0, 0, 0, 0]], [[4, -1, 99, -5]])):
        asked = plan._replace(pages=jnp.asarray(pages, jnp.int32), offsets=jnp.asarray(offsets, jnp.int32))
        _, after = extend(asked, before, *case.new(), case.turn())
        for mine, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_tables_out_of_range_are_read_somewhere_in_the_cache() -> None:
    case = Case((0,), (40,), 40)
    plan = case.plan()._replace(tables=jnp.asarray([[1 << 30, -(1 << 30), 7]], jnp.int32))
    out, _ = extend(plan, case.cache(), *case.new(), case.turn())
    assert out.shape == (1, 40, 6, 64)


def call(**others: Any) -> None:
    """The kernel itself with what a small case has, other arguments and attributes in place of some."""
    case = Case((3,), (5,), 5, page=4)
    plan, cache, turn = case.plan(), case.cache(), case.turn()
    heads = jnp.concatenate(case.new(), axis=-2)
    given = {"heads": heads, "cos": turn.cos, "sin": turn.sin, "k": cache.k, "v": cache.v, **plan._asdict()}
    named = {"cap": np.float32(0), "kv_heads": np.int32(2), "page_tokens": np.int32(4)}
    named |= {"scale": np.float32(1), "window": np.int32(0)}
    named |= {key: others.pop(key) for key in list(others) if key in named}
    given |= others
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (case.new()[0], given["k"], given["v"])]
    target = jax.ffi.ffi_call(build.target("prompts"), shapes, input_output_aliases={3: 1, 4: 2})
    jax.block_until_ready(jax.jit(lambda *x: target(*x, **named))(*given.values()))


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"heads": jnp.zeros((1, 5, 10, 72))}, "heads"),
        ({"heads": jnp.zeros((5, 10, 64))}, "heads"),
        ({"heads": jnp.zeros((1, 5, 11, 64))}, "heads"),
        ({"heads": jnp.zeros((1, 5, 10, 64), jnp.float16)}, "heads"),
        ({"kv_heads": np.int32(0)}, "heads"),
        ({"kv_heads": np.int32(5)}, "heads"),
        ({"cos": jnp.zeros((1, 5, 33)), "sin": jnp.zeros((1, 5, 33))}, "cos and sin"),
        ({"cos": jnp.zeros((1, 4, 32))}, "cos and sin"),
        ({"sin": jnp.zeros((1, 5, 32), jnp.bfloat16)}, "cos and sin"),
        ({"k": jnp.zeros((4, 2, 8, 64))}, "keys and values"),
        ({"v": jnp.zeros((1, 2, 4, 64))}, "keys and values"),
        ({"k": jnp.zeros((3, 2, 4, 64), jnp.int8)}, "float32 or bfloat16"),
        ({"page_tokens": np.int32(0)}, "not empty"),
        ({"tables": jnp.zeros((2, 2), jnp.int32)}, "tables"),
        ({"tables": jnp.zeros((1, 2), jnp.float32)}, "tables"),
        ({"lengths": jnp.zeros(2, jnp.int32)}, "lengths"),
        ({"starts": jnp.zeros((), jnp.int32)}, "starts"),
        ({"pages": jnp.zeros((1, 4), jnp.int32)}, "pages"),
        ({"offsets": jnp.zeros((5, 1), jnp.int32)}, "offsets"),
    ],
)
def test_wrong_shapes_are_refused(others: dict[str, Any], why: str) -> None:
    call()
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"INVALID_ARGUMENT.*{why}"):
        call(**others)


def test_a_layer_outside_of_its_pool_is_refused() -> None:
    case = Case((3,), (5,), 5, page=4)
    geometry = Geometry(1, (2, 4, 64), 4 * 2 * 2 * 4 * 64)
    for number, right in ((0, True), (8, False), (-1, False)):
        cache = SharedCaches(jnp.zeros((1, geometry.slab)), geometry).layer(number)
        backend = SharedAttention(NATIVE, geometry)
        asked = partial(extend, case.plan(), cache, *case.new(), case.turn(), backend=backend)
        if right:
            jax.block_until_ready(asked())
        else:
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="blocks must be in the cache"):
                jax.block_until_ready(asked())

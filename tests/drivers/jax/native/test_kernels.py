"""The native kernels compute what NumPy and XLA compute, at any size, and are refused nowhere silently."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax import platform
from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.plans import DecodePlan, Scoring
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import layers, quant
from llmos.drivers.jax.native import build, kernels, trial
from llmos.ipc.errors import NotSupported

PAGES, PAGE, WIDTH = 24, 4, 6
TYPES = [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)]


@pytest.fixture(autouse=True)
def compiled(native_kernels: bool) -> None:
    if not native_kernels:
        pytest.skip(kernels.state())


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    made = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(made * 50 if dtype == jnp.int8 else made).astype(dtype)


@pytest.mark.parametrize("weight_type", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("row_type", [jnp.float32, jnp.bfloat16])
def test_a_product_equals_numpy_for_any_number_of_rows_and_odd_sizes(row_type: Any, weight_type: Any) -> None:
    for rows, outer, inner in [
        (1, 1, 1),
        (1, 37, 83),
        (2, 960, 64),
        (3, 25, 576),
        (7, 100, 40),
        (31, 49, 96),
        (32, 49, 96),
        (75, 100, 83),
        (75, 101, 86),
        (128, 30, 34),
        (129, 30, 34),
        (520, 40, 64),
    ]:
        x, w = values((rows, inner), row_type), values((outer, inner), weight_type, 1)
        expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        got = np.asarray(jax.jit(kernels.product, static_argnums=2)(x, w, jnp.float32))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_a_large_product_is_shared_among_threads_without_loss() -> None:
    x, w = values((2, 512), jnp.float32), values((4096, 512), jnp.float32, 1)
    expected = np.asarray(x) @ np.asarray(w).T
    call = jax.jit(kernels.product)
    for _ in range(20):
        np.testing.assert_allclose(np.asarray(call(x, w)), expected, atol=1e-3)


@pytest.mark.parametrize("rows", [2, 80, 140])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("out", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_stays_so(rows: int, place: int, dtype: Any, out: Any) -> None:
    x = jnp.ones((rows, 64), dtype).at[0, place].set(jnp.nan).at[1, place].set(jnp.inf)
    got = np.asarray(kernels.product(x, jnp.ones((9, 64), dtype), out), np.float32)
    assert np.isnan(got[0]).all()
    assert np.isinf(got[1]).all()
    assert (got[2:] == 64).all()


@pytest.mark.parametrize("rows", [4, 70])
def test_a_narrow_result_is_rounded_to_nearest(rows: int) -> None:
    x, w = values((rows, 64), jnp.float32), values((33, 64), jnp.float32, 1)
    wide = kernels.product(x, w)
    assert bool((kernels.product(x, w, jnp.bfloat16) == wide.astype(jnp.bfloat16)).all())


@pytest.mark.parametrize("rows", [2, 140])
@pytest.mark.parametrize("place", [0, 1])
def test_a_number_beside_a_zero_is_not_lost(rows: int, place: int) -> None:
    x = values((rows, 64), jnp.bfloat16).at[:, 1 - place :: 2].set(0)
    w = values((9, 64), jnp.bfloat16, 1).at[:, 1 - place :: 2].set(0)
    got = kernels.product(x, w, jnp.float32)
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, atol=1e-3)


@pytest.mark.parametrize("weight_type", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_row_is_the_same_whatever_rows_are_beside_it(weight_type: Any) -> None:
    x, w = values((31, 86), jnp.bfloat16), values((29, 86), weight_type, 1)
    alone = np.asarray(kernels.product(x[:1], w, jnp.float32))
    for rows in (2, 3, 4, 5, 8, 31):
        np.testing.assert_array_equal(kernels.product(x[:rows], w, jnp.float32)[:1], alone)


def lowered(rows: int, dtype: Any, wanted: bool) -> str:
    """The program of a layer's product with so many rows."""
    weight, x = values((8, 16), dtype), values((rows, 16), dtype)
    with kernels.use(wanted):
        return jax.jit(lambda x: layers.product(x, weight)).lower(x).as_text()


def test_layers_use_the_kernel_only_where_it_is_wanted() -> None:
    for rows in (1, 2, 9, 512):
        assert "llmos_product" in lowered(rows, jnp.float32, True)
        assert "llmos_product" not in lowered(rows, jnp.float32, False)


def test_many_rows_of_bfloat16_are_left_to_a_processor_that_multiplies_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able in (False, True):
        monkeypatch.setattr(platform, "multiplies_matrices", lambda able=able: able)
        assert ("llmos_product" in lowered(512, jnp.bfloat16, True)) is not able
        assert "llmos_product" in lowered(32, jnp.bfloat16, True)
        assert "llmos_product" in lowered(512, jnp.float32, True)


def test_an_int8_weight_with_scales_goes_to_the_kernel() -> None:
    x, (weight, scale) = (
        values((3, 64), jnp.float32),
        quant.quantise(values((24, 64), jnp.float32, 1), jnp.int8),
    )

    def run(wanted: bool) -> np.ndarray:
        with kernels.use(wanted):
            return np.asarray(jax.jit(lambda: layers.product(x, weight, scale=scale))())

    np.testing.assert_allclose(run(True), run(False), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gates_are_those_of_xla_of_any_size(dtype: Any, activation: Any) -> None:
    for rows, size in ((8, 1), (9, 16), (64, 83), (130, 1536)):
        both = values((rows, 2 * size), dtype)
        run = lambda wanted, both=both: _gated(both, activation, wanted)  # noqa: E731
        rtol = 1e-5 if dtype == jnp.float32 else 8e-3
        np.testing.assert_allclose(run(True), run(False), rtol=rtol, atol=1e-6)


def _gated(both: jax.Array, activation: Any, wanted: bool) -> np.ndarray:
    with kernels.use(wanted):
        call = jax.jit(lambda x: layers.gated(activation, x))
        native = "llmos_gate" in call.lower(both).as_text()
        assert native is (wanted and activation != "gelu")
        return np.asarray(call(both), np.float32)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_large_and_infinite_numbers_are_zero_or_what_came_in(activation: Any) -> None:
    gate = jnp.asarray([[-jnp.inf, -1e30, -200, -90, 0, 90, 200, 1e30, jnp.inf, jnp.nan]] * 8)
    with kernels.use(True):
        got = np.asarray(layers.gated(activation, jnp.concatenate([gate, jnp.ones_like(gate)], axis=-1)))[0]
    np.testing.assert_allclose(got[1:5], 0, atol=1e-30)
    np.testing.assert_allclose(got[5:9], [90, 200, 1e30, np.inf], rtol=1e-6)
    assert np.isnan(got[9])


def test_few_rows_are_gated_by_xla() -> None:
    with kernels.use(True):
        assert not kernels.gates(values((kernels.SOME - 1, 8), jnp.float32), "silu")
        assert kernels.gates(values((kernels.SOME, 8), jnp.float32), "silu")


def test_gates_of_an_odd_or_unknown_shape_are_refused() -> None:
    for x in (values((8, 7), jnp.float32), values((8, 8), jnp.float16), values((2, 8, 8), jnp.float32)):
        shape = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 2), x.dtype)
        call = jax.ffi.ffi_call(build.target("gate"), shape)
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="gate takes x"):
            call(x, activation=np.int32(0))


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=5), Scoring(cap=3.0, scale=0.3)])
@pytest.mark.parametrize(
    ("kind", "kept"), [(jnp.float32,) * 2, (jnp.bfloat16,) * 2, (jnp.float32, jnp.bfloat16)]
)
def test_attention_equals_xla_and_writes_the_same_cache(scoring: Scoring, kind: Any, kept: Any) -> None:
    rng = np.random.default_rng(3)
    lengths = np.array([1, 4, 23, 9, 0], np.int32)
    tables = rng.permutation(PAGES - 1)[:20].reshape(5, 4)
    tables = np.pad(tables, ((0, 0), (0, WIDTH - 4)), constant_values=PAGES - 1).astype(np.int32)
    tables[2, 4:] = [20, 21]
    last = np.maximum(lengths - 1, 0)
    pages = np.where(lengths > 0, tables[np.arange(5), last // PAGE], PAGES)
    plan = DecodePlan(*(jnp.asarray(x, jnp.int32) for x in (tables, lengths, pages, last % PAGE)))
    cache = PagedCache(*(values((PAGES, 2, PAGE, 16), kept, seed) for seed in (4, 5)))
    q, k, v = (values((5, heads, 16), kind, seed) for heads, seed in ((8, 6), (2, 7), (2, 8)))
    run = lambda backend: jax.jit(lambda c: backend.decode(plan, c, q, k, v, scoring))(cache)  # noqa: E731
    expected, old = run(XlaAttention())
    got, new = run(NativeAttention())
    tolerance = 1e-5 if kept == kind == jnp.float32 else 3e-2
    np.testing.assert_allclose(got[:4].astype(float), expected[:4].astype(float), atol=tolerance)
    assert bool(jnp.isfinite(got[4]).all())
    for mine, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert bool((mine == theirs).all())


def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trial.run()
    monkeypatch.setattr(kernels, "product", lambda rows, weight, out: rows @ weight.T + 1)
    with pytest.raises(NotSupported, match="product of 5 rows in float32 computes wrongly here: off by 1"):
        trial.run()

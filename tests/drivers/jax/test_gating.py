"""The gated product as one kernel: where it is used, how it is cut, and what it computes.

There is no GPU here: it is lowered for one, and run by Mosaic's interpreter where jax has one that knows
transposed tiles (0.11).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.jax import gate_kernel, gating
from llmos.drivers.jax.config import Activation, DecoderConfig
from llmos.drivers.jax.layers import ACTIVATIONS
from llmos.drivers.jax.modules import MLP, random

multiples = st.integers(1, 64)


@given(rows=multiples, inner=multiples, hidden=multiples)
def test_tiles_cover_the_product_once_and_fill_the_device_evenly(rows: int, inner: int, hidden: int) -> None:
    rows, inner, hidden = 128 * rows, 16 * inner, 64 * hidden
    tile = gating.tiling(rows, inner, hidden)
    if rows < gating.LEAST_ROWS or all(inner % width for width in gating.WIDTHS):
        assert tile is None
        return
    assert tile is not None
    assert tile.across * tile.cluster * gating.ROWS == rows
    assert tile.along * tile.width == inner
    assert tile.depth * gating.DEPTH == hidden
    assert tile.clusters * tile.cluster <= gating.MULTIPROCESSORS
    tiles = tile.across * tile.along
    most = -(-tiles // tile.clusters)
    assert most == -(-tiles // (gating.MULTIPROCESSORS // tile.cluster))  # no block has more than it must
    if tile.chained:
        assert tiles // tile.clusters >= 2


@pytest.mark.parametrize(
    ("rows", "inner", "hidden"), [(300, 128, 64), (128, 128, 64), (256, 40, 64), (256, 64, 48)]
)
def test_what_does_not_fit_into_tiles_is_left_to_xla(rows: int, inner: int, hidden: int) -> None:
    assert gating.tiling(rows, inner, hidden) is None
    with pytest.raises(ValueError, match="cannot be cut"):
        gate_kernel.product(jnp.zeros((rows, hidden)), jnp.zeros((2 * inner, hidden)), "silu")


@pytest.mark.parametrize(
    ("rows", "inner", "hidden", "width"),
    [(8192, 14336, 4096, 128), (2048, 14336, 4096, 128), (256, 14336, 4096, 112), (256, 3072, 1024, 48)],
)
def test_the_width_is_the_one_that_leaves_least_to_wait_for(
    rows: int, inner: int, hidden: int, width: int
) -> None:
    tile = gating.tiling(rows, inner, hidden)
    assert tile is not None
    assert tile.width == width


@pytest.mark.parametrize("activation", gating.ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "inner", "hidden"), [(8192, 14336, 4096), (256, 14336, 4096), (384, 1536, 576)]
)
def test_the_kernel_is_lowered_for_a_gpu(activation: Activation, rows: int, inner: int, hidden: int) -> None:
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, hidden), (2 * inner, hidden)))
    traced = jax.jit(partial(gate_kernel.product, activation=activation)).trace(x, weight)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter knows no transposed tiles")
@pytest.mark.parametrize("activation", gating.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inner"), [(256, 96), (384, 64), (512, 128)])
def test_the_kernel_computes_what_xla_does(rows: int, inner: int, activation: Activation) -> None:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    keys = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(keys[0], (rows, 256), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (2 * inner, 256), jnp.bfloat16) * 0.1
    made = gate_kernel.product(x, weight, activation, interpret=InterpretGPUParams())
    gate, up = jnp.split(x.astype(jnp.float32) @ weight.astype(jnp.float32).T, 2, axis=-1)
    np.testing.assert_allclose(
        np.asarray(made, np.float32), np.asarray(ACTIVATIONS[activation](gate) * up), rtol=0.02, atol=0.02
    )


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As if the kernel had passed its trial: what it was called with, computed plainly."""
    asked = []

    def plainly(x: jax.Array, weight: jax.Array, activation: Activation) -> jax.Array:
        asked.append(x.shape)
        gate, up = jnp.split(x.astype(jnp.float32) @ weight.astype(jnp.float32).T, 2, axis=-1)
        return (ACTIVATIONS[activation](gate) * up).astype(x.dtype)

    monkeypatch.setattr(gating, "_state", "ready")
    monkeypatch.setattr(gating, "LEAST_WEIGHT", 1)
    monkeypatch.setattr(gating, "product", plainly)
    return asked


def mlp(config: DecoderConfig) -> MLP:
    return MLP(config, random(jnp.bfloat16, 1))


CONFIG = DecoderConfig(
    vocab_size=64,
    hidden=64,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=32,
    intermediate=96,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)


def test_an_mlp_takes_the_kernel_for_many_rows_and_computes_the_same(
    ready: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = mlp(CONFIG)
    x = jax.random.normal(jax.random.key(2), (2, 128, 64), jnp.bfloat16)
    fused = layer(x)
    assert ready == [(256, 64)]
    monkeypatch.setattr(gating, "_state", "")
    apart = layer(x)
    assert fused.shape == apart.shape == x.shape
    np.testing.assert_allclose(
        np.asarray(fused, np.float32), np.asarray(apart, np.float32), rtol=0.02, atol=0.02
    )


def test_few_rows_small_and_quantised_weights_keep_to_xla(
    ready: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, many = mlp(CONFIG), jnp.ones((256, 64), jnp.bfloat16)
    layer(many[:4])
    with monkeypatch.context() as smaller:
        smaller.setattr(gating, "LEAST_WEIGHT", layer.gate_up.weight.get_value().size + 1)
        layer(many)
    layer.gate_up.quantise(jnp.int8)
    layer(many)
    assert ready == []


@pytest.mark.parametrize("activation", gating.ACTIVATIONS)
def test_gates_are_exact_enough_for_bfloat16(activation: Activation) -> None:
    x = jnp.linspace(-30, 30, 10001, dtype=jnp.float32)
    np.testing.assert_allclose(
        gate_kernel.GATES[activation](x), ACTIVATIONS[activation](x), rtol=2e-4, atol=1e-6
    )


def test_no_other_device_is_tried() -> None:
    assert not gating.enable(jax.devices()[0])
    assert gating._state == ""

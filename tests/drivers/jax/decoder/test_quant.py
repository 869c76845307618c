"""8-bit values and products: how exact they are, which way is picked, and what happens at the edges."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.experts import Experts, route
from llmos.drivers.jax.decoder.layers import Linear, product
from llmos.drivers.jax.native import kernels

KINDS = list(quant.DTYPES)
HALF_STEP = {"int8": 0.5 / 127, "float8": 2.0**-4}
"""The largest rounding error: int8 against a run's largest value, float8 against each value itself."""


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_within_half_a_step(kind: str) -> None:
    x = normal(6, 200) * 10.0 ** jnp.arange(-3, 3)[:, None]
    values, scale = quant.quantise(x, quant.DTYPES[kind])
    found = values.astype(jnp.float32) * scale[:, None]
    reference = jnp.abs(x).max(axis=1, keepdims=True) if kind == "int8" else jnp.abs(x)
    least = 2.0**-10 * scale[:, None]  # half of float8's smallest step
    assert values.dtype == quant.DTYPES[kind]
    assert (jnp.abs(found - x) <= reference * HALF_STEP[kind] * 1.001 + least).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_zeros_stays_zero(kind: str) -> None:
    weight, scale = quant.quantise(normal(4, 32).at[1].set(0), quant.DTYPES[kind])
    assert np.isfinite(scale).all()
    assert (np.asarray(scale) > 0).all()
    found = np.asarray(product(normal(3, 32), weight, scale=scale))
    assert not found[:, 1].any()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(kind: str, bad: float) -> None:
    _, scale = quant.quantise(normal(3, 32).at[1, 4].set(bad), quant.DTYPES[kind])
    assert np.isfinite(np.asarray(scale)).tolist() == [True, False, True]


@pytest.mark.parametrize("way", ["native", "widened", "blocked"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_near_the_float_product(
    kind: str, rows: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant, "choose", lambda *_: way)
    monkeypatch.setattr(quant, "BLOCK", 1024)
    x, weight = normal(2, rows, 96), normal(48, 96, seed=1)
    values, scale = quant.quantise(weight, quant.DTYPES[kind])
    found = jax.jit(lambda x: product(x, values, scale=scale))(x)
    assert found.shape == (2, rows, 48)
    # Rounding errors of either factor, a uniform share of a step, add up as a random walk of 96 terms.
    noise = 2 * 0.0225 if kind == "float8" else 2 * 3.0 / 127 / 12**0.5
    assert float(jnp.abs(found - x @ weight.T).max()) < 5 * noise * 96**0.5


def test_the_native_kernel_gives_what_xla_gives(native_kernels: bool) -> None:
    if not native_kernels:
        pytest.skip(kernels.state())
    values, scale = quant.quantise(normal(48, 96, seed=1), jnp.int8)
    x = normal(3, 96)

    def run(x: jax.Array) -> jax.Array:
        return product(x, values, scale=scale)

    expected = jax.jit(run)(x)
    with kernels.use(True):
        text = jax.jit(lambda x: run(x)).lower(x).as_text()
        found = jax.jit(lambda x: run(x))(x)
    assert "custom_call" in text
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "choose", lambda *_: "native")
    values, scale = quant.quantise(normal(32, 64, seed=1), quant.DTYPES[kind])
    x = normal(4, 64) * jnp.asarray([1.0, 1e3, 1e-3, 7.0])[:, None]
    together = product(x, values, scale=scale)
    alone = jnp.concatenate([product(row[None], values, scale=scale) for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "rows", "out", "platform", "way"),
    [
        ("int8", 256, 64, "gpu", "native"),
        ("int8", 8, 64, "gpu", "widened"),
        ("float8", 1, 64, "gpu", "widened"),
        ("float8", 64, 64, "gpu", "native"),
        ("float8", 256, 65, "gpu", "widened"),
        ("float8", 256, 64, "tpu", "widened"),
        ("int8", 256, 64, "cpu", "blocked"),
        ("float8", 1, 64, "cpu", "blocked"),
    ],
)
def test_the_way_follows_platform_and_rows(kind: str, rows: int, out: int, platform: str, way: str) -> None:
    assert quant.choose(quant.DTYPES[kind], rows, out, 128, platform) == way


def test_a_float8_product_reaches_xla_with_two_float8_operands() -> None:
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return quant.native(quant.quantise(x, jnp.float8_e4m3fn)[0], weight, jnp.bfloat16)

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((4, 64), jnp.bfloat16), ((32, 64), jnp.float8_e4m3fn))]
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    dot = next(line for line in text.splitlines() if "dot_general" in line)
    assert "(tensor<4x64xf8E4M3FN>, tensor<32x64xf8E4M3FN>) -> tensor<4x32xbf16>" in dot


def test_a_linear_keeps_its_bias_in_float() -> None:
    linear = Linear(16, 32, lambda shape: normal(*shape), bias=True)
    x = normal(5, 32, seed=3)
    expected = linear(x)
    linear.quantise(jnp.int8)
    assert {
        name: part.dtype for name, part in vars(linear).items() if name in ("weight", "scale", "bias")
    } == {
        "weight": jnp.int8,
        "scale": jnp.float32,
        "bias": jnp.float32,
    }
    np.testing.assert_allclose(linear(x), expected, atol=0.2)


CONFIG = DecoderConfig(
    vocab_size=8, hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8, intermediate=8, norm_eps=1e-5,
    rope_theta=10000.0, max_positions=64, experts=6, active_experts=2, expert_intermediate=12,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_groupings_of_quantised_experts_agree(kind: str) -> None:
    experts = Experts(CONFIG, lambda shape: normal(*shape, seed=len(shape)) / 4)
    rows = normal(5, 16)

    def every(rows: jax.Array) -> list[Any]:
        shares, chosen = route(experts.router(rows), 2, True)
        ways = (experts.gathered, experts.ragged, experts.singly, experts.turns)
        return [way(rows, shares, chosen) for way in ways]

    exact = every(rows)[0]
    experts.quantise(quant.DTYPES[kind])
    assert experts.gate.dtype == quant.DTYPES[kind]
    assert experts.router.weight.dtype == jnp.float32
    found = jax.jit(every)(rows)
    for other in found:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    np.testing.assert_allclose(found[0], exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_scales_are_named_after_their_weights() -> None:
    shapes = {
        "norm.scale": jnp.ones(3),
        "layers.0.mlp.down.weight": jnp.ones((2, 2), jnp.int8),
        "layers.1.mlp.gate": jnp.ones((2, 2, 2), jnp.float8_e4m3fn),
    }
    assert quant.scale_paths(shapes) == {"layers.0.mlp.down.scale", "layers.1.mlp.gate_scale"}

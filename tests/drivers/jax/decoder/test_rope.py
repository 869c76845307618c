"""Rotary embedding: frequencies, Llama 3's scaling, and that only distance matters."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.rope import for_context, frequencies, llama3_factors, rotate, rotation, tables

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)


def test_frequencies_fall_geometrically() -> None:
    np.testing.assert_allclose(frequencies(CONFIG), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_factors_divide_the_frequencies() -> None:
    scaled = frequencies(replace(CONFIG, rope_factors=(1.0, 2.0, 4.0, 8.0)))
    np.testing.assert_allclose(scaled, [1.0, 0.05, 0.0025, 0.000125], rtol=1e-6)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    factors = llama3_factors(128, 500000.0, factor=8.0, low=1.0, high=4.0, original=8192)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
    assert list(factors) == sorted(factors)
    assert any(1.5 < factor < 7.5 for factor in factors)


def test_scores_depend_on_distance_alone() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 8)).astype(np.float32)
    inverse = frequencies(CONFIG)

    def score(at: int, to: int) -> float:
        turned = [rotate(jnp.asarray(x), *rotation(jnp.asarray([p]), inverse)) for x, p in ((q, at), (k, to))]
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 8), abs=1e-3)


def test_part_of_a_head_is_turned_and_the_rest_kept() -> None:
    config = replace(CONFIG, rotary=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 8)), jnp.float32)
    turned = rotate(x, *rotation(jnp.asarray([5]), frequencies(config)))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[..., :4], x[..., :4])


def test_without_a_base_nothing_is_turned() -> None:
    config = replace(CONFIG, rope_theta=0.0)
    x = jnp.ones((1, 1, 8))
    np.testing.assert_array_equal(rotate(x, *rotation(jnp.asarray([5]), frequencies(config))), x)


def test_local_layers_have_a_table_of_their_own() -> None:
    config = replace(CONFIG, local_theta=100.0, rope_factors=(2.0,) * 4)
    assert tables(config)[0] == pytest.approx([0.5, 0.05, 0.005, 0.0005])
    assert tables(config)[1] == pytest.approx([1.0, 100**-0.25, 0.1, 100**-0.75])


def test_long_contexts_have_factors_of_their_own() -> None:
    config = replace(CONFIG, rope_factors=(1.0,) * 4, rope_long_factors=(3.0,) * 4, rope_original=32)
    assert for_context(config, 32).rope_factors == (1.0,) * 4
    assert for_context(config, 33).rope_factors == (3.0,) * 4
    assert for_context(replace(config, max_positions=32), 4096).rope_factors == (1.0,) * 4

"""Mixtures of experts: every way of grouping the products gives the same result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.experts import Experts, choose, route

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    intermediate=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
    experts=6,
    active_experts=2,
    expert_intermediate=12,
)


def plain(experts: Experts, row: np.ndarray, shares: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """One token, expert by expert."""
    gate, up, down = (np.asarray(part[...], np.float64) for part in (experts.gate, experts.up, experts.down))
    total = np.zeros(16)
    for share, index in zip(shares, chosen):
        opened = gate[index] @ row
        total += share * (down[index] @ (opened / (1 + np.exp(-opened)) * (up[index] @ row)))
    return total


def test_all_groupings_agree() -> None:
    rng = np.random.default_rng(1)
    experts = Experts(CONFIG, lambda shape: jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32))
    rows = jnp.asarray(rng.standard_normal((5, 16)), jnp.float32)

    @jax.jit
    def every(rows: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        shares, chosen = route(experts.router(rows), 2, True)
        ways = (experts.gathered, experts.ragged, experts.singly, experts.turns)
        return shares, chosen, [way(rows, shares, chosen) for way in ways]

    shares, chosen, results = every(rows)
    expected = [plain(experts, *map(np.asarray, parts)) for parts in zip(rows, shares, chosen)]
    for found in results:
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_shares_are_of_all_experts_or_of_the_chosen() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.1, 0.3, 0.1]]))
    shares, chosen = route(logits, 2, False)
    assert chosen.tolist() == [[0, 2]]
    np.testing.assert_allclose(shares, [[0.5, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, True)[0], [[0.625, 0.375]], rtol=1e-6)


@pytest.mark.parametrize(
    ("assignments", "platform", "grouping"),
    [(8, "gpu", "gather"), (8, "cpu", "singly"), (65, "gpu", "ragged"), (65, "cpu", "turns")],
)
def test_few_tokens_gather_and_many_are_grouped(assignments: int, platform: str, grouping: str) -> None:
    assert choose(assignments, 128, platform) == grouping

"""Tokens chosen from logits that are cut over devices are those chosen from whole ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from llmos.drivers.jax.execution.state import Choice, pack_choices
from llmos.drivers.jax.sampling.sampling import VARIANTS, Variant, choose
from llmos.drivers.jax.sharding.collectives import Columns, every
from llmos.drivers.sdk.messages import Sampling

AXES = ("expert", "tensor")
ROWS, PARTS = 4, 4
REPLICATED = PartitionSpec()
CUT = PartitionSpec(None, AXES)
MESH = Mesh(np.asarray(jax.devices()[:PARTS]).reshape(2, 2), AXES)
POSITION = jnp.arange(ROWS) + 5


def whole(variant: Variant, logits: np.ndarray, choice: Choice) -> list[int]:
    columns = Columns(logits.shape[1])
    return choose(variant, jnp.asarray(logits), choice, POSITION, columns).tolist()


def cut(variant: Variant, logits: np.ndarray, choice: Choice) -> list[int]:
    """The same by four devices, the last of which has padding that would win."""
    columns = Columns(logits.shape[1], AXES)
    padded = np.pad(logits, ((0, 0), (0, -logits.shape[1] % PARTS)), constant_values=1e9)

    def run(part: jax.Array) -> jax.Array:
        return choose(variant, part, choice, POSITION, columns)

    local = jax.shard_map(run, mesh=MESH, in_specs=CUT, out_specs=REPLICATED, check_vma=False)
    return jax.jit(local)(padded).tolist()


def choices(**fields: Any) -> Choice:
    packed = pack_choices([Sampling(seed=seed, **fields) for seed in range(ROWS)])
    return Choice(*(jnp.asarray(field) for field in packed))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [64, 61, 5])
def test_tokens_are_those_of_one_device(variant: Variant, vocab: int) -> None:
    logits = np.random.default_rng(vocab).standard_normal((ROWS, vocab)).astype(np.float32) * 2
    for fields in ({}, {"temperature": 0.9}, {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05}):
        assert cut(variant, logits, choices(**fields)) == whole(variant, logits, choices(**fields))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -np.inf, np.nan, np.inf]), min_size=6, max_size=6),
        min_size=ROWS,
        max_size=ROWS,
    )
)
def test_the_first_of_equals_wins_and_what_is_not_finite_is_refused(rows: list[list[float]]) -> None:
    logits = np.asarray(rows, np.float32)
    assert cut("greedy", logits, choices()) == whole("greedy", logits, choices())


def test_every_device_has_the_parts_of_all() -> None:
    def run(part: jax.Array) -> jax.Array:
        return every(part[0], AXES)

    spec = PartitionSpec(AXES)
    local = jax.shard_map(run, mesh=MESH, in_specs=spec, out_specs=REPLICATED, check_vma=False)
    parts = np.arange(12, dtype=np.float32).reshape(PARTS, 3)
    np.testing.assert_array_equal(jax.jit(local)(parts), parts)

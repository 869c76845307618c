"""The noise is that of ``jax.random``, to the bit, and depends on seed and position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.jax.sampling.noise import noise, threefry

VOCAB = 1000
ENDS = [(0, 0), (1, 0), (0, 1), (2**31 - 1, 2**31 - 1), (2**31, 5), (2**32 - 1, 2**31 - 1)]
ROWS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)), min_size=6, max_size=6)


def own(rows: list[tuple[int, int]], vocab: int = VOCAB) -> np.ndarray:
    seeds, positions = zip(*rows)
    return np.asarray(_noise(jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32), vocab))


_noise = jax.jit(noise, static_argnums=2)


@jax.jit
def _theirs(seed: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (VOCAB,), jnp.float32)


def check(rows: list[tuple[int, int]]) -> None:
    expected = [_theirs(jnp.uint32(seed), jnp.int32(position)) for seed, position in rows]
    np.testing.assert_array_equal(own(rows), np.stack(expected))


def test_it_is_that_of_jax_at_the_ends_of_seeds_and_positions() -> None:
    check(ENDS)


@settings(max_examples=20, deadline=None)
@given(ROWS)
def test_it_is_that_of_jax(rows: list[tuple[int, int]]) -> None:
    check(rows)


def test_the_cipher_is_the_published_one_in_jax_and_in_numpy() -> None:
    # Known answers of Random123 for threefry2x32 with 20 rounds.
    for key, block, expected in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]:
        for array in (jnp.asarray, np.asarray):
            given = [(array([x], np.uint32), array([y], np.uint32)) for x, y in (key, block)]
            assert tuple(int(x[0]) for x in threefry(given[0], given[1])) == expected


def test_it_depends_on_seed_and_position_alone() -> None:
    together, alone = own([(1, 5), (2, 5), (1, 6)]), own([(2, 5)])
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(together[0], together[2])


def test_a_longer_vocabulary_begins_with_the_same_noise() -> None:
    np.testing.assert_array_equal(own([(3, 9)], VOCAB + 77)[:, :VOCAB], own([(3, 9)]))

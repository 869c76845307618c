"""Gumbel noise keyed by seed and position, by Threefry-2x32 with 20 rounds (Salmon et al., 2011).

To the bit what ``jax.random.gumbel`` of a key that has the position folded in gives; but jax rolls the rounds
into loops on a CPU, which takes three times as long.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ONE = 0x3F800000  # the bits of 1.0

Pair = tuple[Any, Any]


def noise(seed: jax.Array, position: jax.Array, count: int, first: jax.Array | int = 0) -> jax.Array:
    """Gumbel noise [B, count] of the tokens from ``first`` on, keyed by (seed [B], position [B]).

    argmax(logits + noise) samples softmax.
    """
    nothing = jnp.zeros_like(seed)
    key = threefry((nothing, seed), (nothing, position.astype(jnp.uint32)))
    place = (first + jnp.arange(count)).astype(jnp.uint32)[None, :]
    first, second = threefry((key[0][:, None], key[1][:, None]), (jnp.zeros_like(place), place))
    mantissa = ((first ^ second) >> 9) | np.uint32(_ONE)
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    # Zero is the only number that jax.random's affine map to [tiny, 1) changes.
    return -jnp.log(-jnp.log(jnp.maximum(uniform, np.finfo(np.float32).tiny)))


def threefry(key: Pair, block: Pair) -> Pair:
    """``block`` enciphered with ``key``; uint32 arrays, of jax or of NumPy, of shapes that broadcast."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = block[0] + keys[0], block[1] + keys[1]
    for turn in range(5):
        for bits in _ROTATIONS[turn % 2]:
            x = x + y
            y = (y << np.uint32(bits) | y >> np.uint32(32 - bits)) ^ x
        x, y = x + keys[(turn + 1) % 3], y + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return x, y

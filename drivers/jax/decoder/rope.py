"""Rotary position embedding (Su et al., 2021), in the half-split layout of Hugging Face."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.decoder.config import DecoderConfig

Tables = tuple[tuple[float, ...], ...]


class Turn(NamedTuple):
    """Cosines and sines [..., n / 2], float32, that turn the first n components of a token's heads."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies [rotary_dim / 2] in float32, scaled by the model's factors."""
    plain = _plain(config.rope_theta, config.rotary_dim)
    if not config.rope_factors:
        return plain
    scaled: np.ndarray = (plain / np.asarray(config.rope_factors, np.float32)).astype(np.float32)
    return scaled


def tables(config: DecoderConfig) -> Tables:
    """The frequencies that a model uses: of its global layers, and of its local ones where they differ."""
    found = [frequencies(config)]
    if config.local_theta:
        found.append(_plain(config.local_theta, config.rotary_dim))
    return tuple(tuple(each.tolist()) for each in found)


def for_context(config: DecoderConfig, context: int) -> DecoderConfig:
    """The configuration with the factors that serve contexts of this length.

    A loaded model has one set, for keys that were turned by one cannot be compared with queries turned by
    another (Ding et al., 2024, LongRoPE; vLLM chooses likewise).
    """
    if not config.rope_long_factors or min(context, config.max_positions) <= config.rope_original:
        return config
    return replace(config, rope_factors=config.rope_long_factors)


def longrope_scale(max_positions: int, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by, unless the model says (transformers' default)."""
    factor = max_positions / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _plain(theta: float, size: int) -> np.ndarray:
    if not size:
        return np.zeros(0, np.float32)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain: np.ndarray = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    return plain


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Divisors of the frequencies for Llama 3.1's context extension [head_dim / 2].

    Wavelengths shorter than ``original / high`` are kept, longer than ``original / low`` divided by
    ``factor``, and interpolated between (Hugging Face transformers, ``_compute_llama3_parameters``).
    """
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(factors)


def rotation(positions: jax.Array, inverse: np.ndarray, scale: float = 1.0) -> Turn:
    """The turn by integer ``positions`` [...] with these frequencies, multiplied by ``scale``."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse)
    return Turn(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``x`` [..., heads, head_dim] by ``cos`` and ``sin`` [..., n / 2], in float32.

    Only the first n components are turned; with n = 0 ``x`` comes back as it is.
    """
    size = 2 * cos.shape[-1]
    if not size:
        return x
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., size:]], axis=-1)

"""Rotary position embedding (Su et al., 2021), in the half-split layout of Hugging Face."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.config import DecoderConfig


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies [head_dim / 2] in float32, scaled by the model's factors."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain: np.ndarray = (1.0 / np.power(np.float32(config.rope_theta), exponents)).astype(np.float32)
    if not config.rope_factors:
        return plain
    scaled: np.ndarray = (plain / np.asarray(config.rope_factors, np.float32)).astype(np.float32)
    return scaled


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


def rotation(positions: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., head_dim / 2] for integer ``positions`` [...]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``x`` [..., heads, head_dim] by ``cos`` and ``sin`` [..., head_dim / 2], in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

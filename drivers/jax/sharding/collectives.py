"""What modules do where their parameters are one part of several: sums and gathers over axes of the mesh.

``axes`` is empty on one device; then nothing here adds to a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmos.drivers.jax.sharding import exchange


@dataclass(frozen=True)
class Split:
    """The axes that the vocabulary and layers of experts are cut over, and those of them that experts are."""

    wide: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()


WHOLE = Split()


def total(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum of every device's part."""
    if not axes:
        return part
    if exchange.suits(part, axes):
        return exchange.total(part)
    whole: jax.Array = jax.lax.psum(part, axes)  # type: ignore[no-untyped-call]
    return whole


def find_rows(table: jax.Array, ids: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Rows ``ids`` [...] of a table whose rows are cut over ``axes``: each device adds those it has."""
    if not axes:
        return table[ids]
    own = ids - jax.lax.axis_index(axes) * table.shape[0]
    held = (own >= 0) & (own < table.shape[0])
    return total(jnp.where(held[..., None], table[jnp.where(held, own, 0)], 0), axes)


def columns(part: jax.Array, axes: tuple[str, ...], size: int) -> jax.Array:
    """The last axis of all parts in a row, less the padding after ``size``."""
    if not axes:
        return part
    whole: jax.Array = jax.lax.all_gather(part, axes, axis=part.ndim - 1, tiled=True)
    return whole[..., :size]

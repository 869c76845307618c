"""What programs do where an array is one part of several: sums, gathers and maxima over axes of the mesh.

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


def every(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """All devices' parts [devices, ...], by a sum: for small arrays, which ``exchange`` adds up."""
    spread = jnp.zeros((jax.lax.axis_size(axes), *part.shape), part.dtype)
    return total(spread.at[jax.lax.axis_index(axes)].set(part), axes)


@dataclass(frozen=True)
class Columns:
    """That the last axis of an array, ``size`` long, is cut over ``axes``, the last parts with padding."""

    size: int
    axes: tuple[str, ...] = ()

    def first(self, part: jax.Array) -> jax.Array | int:
        """The number of a part's first column."""
        return jax.lax.axis_index(self.axes) * part.shape[-1] if self.axes else 0

    def whole(self, part: jax.Array) -> jax.Array:
        """All parts in a row, without padding."""
        if not self.axes:
            return part
        gathered: jax.Array = jax.lax.all_gather(part, self.axes, axis=part.ndim - 1, tiled=True)
        return gathered[..., : self.size]

    def real(self, part: jax.Array) -> jax.Array:
        """A part with -inf for padding."""
        if not self.axes or self.size == part.shape[-1] * jax.lax.axis_size(self.axes):
            return part
        return jnp.where(self.first(part) + jnp.arange(part.shape[-1]) < self.size, part, -jnp.inf)

    def largest(self, part: jax.Array, value: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each row the largest ``value`` [B] of all parts, and its column: the first of equals, or one
        that is no number. ``place`` [B] is where in its ``part`` each device's is."""
        if not self.axes:
            return value, place
        column = (place + self.first(part)).astype(value.dtype)  # float32 has all integers up to 2**24
        values, columns = jnp.moveaxis(every(jnp.stack([value, column]), self.axes), 1, 0)
        best = jnp.argmax(values, axis=0)[None]
        value, column = (jnp.take_along_axis(x, best, axis=0)[0] for x in (values, columns))
        return value, column.astype(place.dtype)

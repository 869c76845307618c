"""Pages as blocks: the programs that gather pages of all layers into one block, and scatter them again.

A block [n, width] holds n pages, each in one piece: every leaf of the caches in their order, as unsigned
integers of the narrowest leaf's size, so that bits are copied and no number is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention.shared import SharedCaches
from llmos.drivers.jax.modules import struct

BLOCK_BYTES = 64 << 20
_UNITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def unit(caches: Any) -> Any:
    """The integers that blocks of these caches are made of."""
    return _UNITS[min(leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))]


def page_bytes(caches: Any) -> int:
    """Bytes of a page over all leaves; the page is the first axis of each, unless the caches are shared."""
    if isinstance(caches, SharedCaches):
        return caches.geometry.page * caches.pool.dtype.itemsize
    return sum(prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def block(caches: Any, pages: int) -> Any:
    """The shape of a block of so many pages."""
    kind = unit(caches)
    return struct((pages, page_bytes(caches) // np.dtype(kind).itemsize), kind)


def block_sizes(caches: Any) -> tuple[int, ...]:
    """How many pages the programs move at once: powers of four, up to ``BLOCK_BYTES``."""
    size, sizes = page_bytes(caches), [1]
    while sizes[-1] * 4 * size <= BLOCK_BYTES:
        sizes.append(sizes[-1] * 4)
    return tuple(sizes)


def parts(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` pages as the sizes of programs, without padding: the largest first."""
    found = []
    while count:
        found.append(next(size for size in reversed(sizes) if size <= count))
        count -= found[-1]
    return found


def _bits(leaf: jax.Array) -> jax.Array:
    """A leaf as integers: a CPU would widen all of a bfloat16 leaf to read some of it."""
    return jax.lax.bitcast_convert_type(leaf, _UNITS[leaf.dtype.itemsize])


def gather(caches: Any, pages: jax.Array) -> jax.Array:
    """The block [n, width] of ``pages`` [n]."""
    if isinstance(caches, SharedCaches):
        blocks, own = caches.pages(pages)
        return _bits(blocks).at[own].get(mode="promise_in_bounds").reshape(len(pages), -1)
    kind = unit(caches)
    taken = [_bits(leaf).at[pages].get(mode="promise_in_bounds") for leaf in jax.tree.leaves(caches)]
    rows = [jax.lax.bitcast_convert_type(x, kind).reshape(len(pages), -1) for x in taken]
    return jnp.concatenate(rows, axis=1)


def scatter(caches: Any, rows: jax.Array, pages: jax.Array) -> Any:
    """The caches with a block [n, width] written to ``pages`` [n], which are all different."""
    if isinstance(caches, SharedCaches):
        blocks, own = caches.pages(pages)
        value = jax.lax.bitcast_convert_type(rows.reshape(*own.shape, -1), blocks.dtype)
        changed = blocks.at[own].set(value, mode="promise_in_bounds", unique_indices=True)
        return caches.with_pages(changed)
    leaves, tree = jax.tree.flatten(caches)
    written, at = [], 0
    for leaf in leaves:
        ratio = leaf.dtype.itemsize // rows.dtype.itemsize
        width = prod(leaf.shape[1:]) * ratio
        shape = (len(pages), *leaf.shape[1:], *([ratio] if ratio > 1 else []))
        # The leaf keeps its type: written as integers it would be copied whole, not updated in place.
        value = jax.lax.bitcast_convert_type(rows[:, at : at + width].reshape(shape), leaf.dtype)
        written.append(leaf.at[pages].set(value, mode="promise_in_bounds", unique_indices=True))
        at += width
    return jax.tree.unflatten(tree, written)

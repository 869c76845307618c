"""Pages as rows: the programs that gather pages of all layers into one row each, and scatter them again.

A row [width] is one page in one piece: every leaf of the caches in their order, as unsigned integers of the
narrowest leaf's size, so that bits are copied and no number is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.attention.shared import SharedCaches
from llmos.drivers.jax.decoder.modules import struct

MOST_BYTES, MOST_ROWS = 128 << 20, 64  # of one program
_UNITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def unit(caches: Any) -> Any:
    """The integers that rows of these caches are made of."""
    return _UNITS[min(leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))]


def page_bytes(caches: Any) -> int:
    """Bytes of a page over all leaves; the page is the first axis of each, unless the caches are shared."""
    if isinstance(caches, SharedCaches):
        return caches.geometry.page * caches.pool.dtype.itemsize
    return sum(prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def row(caches: Any) -> Any:
    """The shape of a page's row."""
    kind = unit(caches)
    return struct((page_bytes(caches) // np.dtype(kind).itemsize,), kind)


def sizes(caches: Any) -> tuple[int, ...]:
    """How many pages the programs move at once: powers of four, up to ``MOST_BYTES`` and ``MOST_ROWS``."""
    found = [1]
    while 4 * found[-1] <= min(MOST_ROWS, MOST_BYTES // page_bytes(caches)):
        found.append(4 * found[-1])
    return tuple(found)


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


def _barrier(block: jax.Array) -> jax.Array:
    """The same block, laid out in memory before anything is done with it."""
    laid: jax.Array = jax.lax.optimization_barrier(block)  # type: ignore[no-untyped-call]
    return laid


def gather(caches: Any, pages: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of ``pages`` [n]."""
    if isinstance(caches, SharedCaches):
        blocks, own = caches.pages(pages)
        block = _bits(blocks).at[own].get(mode="promise_in_bounds").reshape(len(pages), -1)
    else:
        kind = unit(caches)
        taken = [_bits(leaf).at[pages].get(mode="promise_in_bounds") for leaf in jax.tree.leaves(caches)]
        pieces = [jax.lax.bitcast_convert_type(x, kind).reshape(len(pages), -1) for x in taken]
        block = jnp.concatenate(pieces, axis=1)
    # Laid out once, then cut: fused, every row would look for each of its values in every leaf.
    block = _barrier(block)
    return tuple(block[index] for index in range(len(pages)))


def scatter(caches: Any, rows: Sequence[jax.Array], pages: jax.Array) -> Any:
    """The caches with ``rows``, n of them, written to ``pages`` [n], which are all different."""
    block = _barrier(jnp.stack(rows))
    if isinstance(caches, SharedCaches):
        blocks, own = caches.pages(pages)
        value = jax.lax.bitcast_convert_type(block.reshape(*own.shape, -1), blocks.dtype)
        changed = blocks.at[own].set(value, mode="promise_in_bounds", unique_indices=True)
        return caches.with_pages(changed)
    leaves, tree = jax.tree.flatten(caches)
    written, at = [], 0
    for leaf in leaves:
        ratio = leaf.dtype.itemsize // block.dtype.itemsize
        width = prod(leaf.shape[1:]) * ratio
        shape = (len(pages), *leaf.shape[1:], *([ratio] if ratio > 1 else []))
        # The leaf keeps its type: written as integers it would be copied whole, not updated in place.
        value = jax.lax.bitcast_convert_type(block[:, at : at + width].reshape(shape), leaf.dtype)
        written.append(leaf.at[pages].set(value, mode="promise_in_bounds", unique_indices=True))
        at += width
    return jax.tree.unflatten(tree, written)

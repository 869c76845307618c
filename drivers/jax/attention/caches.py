"""Where keys and values of a layer lie, in pages of its own or blocks of a pool, and how they get there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos.drivers.jax.decoder import quant

BITS = jnp.dtype(jnp.uint16)
"""What can hold bfloat16: to write a part of an array of bfloat16, XLA:CPU widens and narrows all of it."""


class PagedCache(NamedTuple):
    """Keys and values of one layer, each [pages, kv_heads, page_tokens, head_dim].

    8-bit ones have float32 scales [pages, kv_heads, page_tokens]. Every array has the page as its first axis.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def first(self) -> int:
        """What is added to a page's number to find its keys in ``k``, and its values in ``v``."""
        return 0

    @property
    def second(self) -> int:
        return 0


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "first"], meta_fields=["block"])
@dataclass(frozen=True)
class PooledCache:
    """Keys and values of one layer among those of others: ``pool`` is made of blocks of the shape ``block``,
    [kv_heads, page_tokens, head_dim].

    A page's number is that of its first block; its keys in this layer lie ``first`` [] blocks behind that,
    its values in the block after its keys.
    """

    pool: jax.Array
    first: jax.Array
    block: tuple[int, int, int]

    @property
    def blocks(self) -> jax.Array:
        """The pool as [blocks, kv_heads, page_tokens, head_dim]."""
        return self.pool.reshape(-1, *self.block)

    @property
    def k(self) -> jax.Array:
        return self.blocks

    @property
    def v(self) -> jax.Array:
        return self.blocks

    @property
    def k_scale(self) -> None:
        return None

    @property
    def v_scale(self) -> None:
        return None

    @property
    def second(self) -> jax.Array:
        return self.first + 1

    def both(self, pages: jax.Array) -> jax.Array:
        """The blocks [2 n] of the keys of pages [n], and then those of their values."""
        return jnp.concatenate([pages + self.first, pages + self.second])

    def written(self, pool: jax.Array) -> PooledCache:
        """This cache with other contents, in any shape."""
        return PooledCache(pool.reshape(self.pool.shape), self.first, self.block)


Cache = PagedCache | PooledCache


def write(cache: Cache, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array) -> Cache:
    """Put k and v [n, kv_heads, head_dim] at (page, offset) [n]; pages out of range are dropped."""
    new = packed(cache, k, v)

    def put(part: jax.Array, new: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
        where = (pages[:, None], jnp.arange(k.shape[1])[None], offsets[:, None])
        return part.at[where].set(new, mode="drop", unique_indices=True)

    if isinstance(cache, PooledCache):
        both = jnp.concatenate([new.k, new.v])
        return cache.written(put(cache.blocks, both, cache.both(pages), jnp.tile(offsets, 2)))
    written: PagedCache = jax.tree.map(lambda part, new: put(part, new, pages, offsets), cache, new)
    return written


def packed(cache: Cache, k: jax.Array, v: jax.Array) -> PagedCache:
    """k and v [..., head_dim] as ``cache`` holds them, with scales [...] if it has any."""
    if cache.k_scale is None:
        return PagedCache(held(k, cache.k.dtype), held(v, cache.v.dtype))
    (keys, k_scale), (values, v_scale) = (quant.quantise(x, cache.k.dtype) for x in (k, v))
    return PagedCache(keys, values, k_scale, v_scale)


def held(x: jax.Array, dtype: Any) -> jax.Array:
    """Numbers as a cache of this type holds them; see ``BITS``."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), BITS) if dtype == BITS else x.astype(dtype)


def numbers(x: jax.Array) -> jax.Array:
    """The numbers that were ``held``."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == BITS else x

"""Low-rank adapters (LoRA; Hu et al., 2021) in a product: ``x W' + x A' B'``, each row with its own A and B.

All adapters that are loaded lie stacked on the device, so that loading and dropping them changes values and
never a program. Steps in which no row has one run programs that are traced without them. In the others a
batch's rows are multiplied in one of three ways, chosen when a program is traced:

- "grouped", on a GPU: two kernels of our own, in which each token meets its own adapter alone; see
  ``grouped``.
- "all": every row with every adapter, two dense products with n * rank columns, and what is not a row's own
  is set to 0 in between. It reads each adapter once, however many rows there are, and costs n * rank * (in +
  out) multiplications a token: for 8 adapters of rank 16 about 6% of a 4,096 by 4,096 product.
- "own": each row with a copy of its own adapter, rank * (in + out) multiplications a token, the least there
  is; but the copies are written and read again, three times as many bytes for each row as an adapter has.

Without the kernels, a row of many tokens (a prompt's chunk) is worth a copy, many rows of one token are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp

Way = Literal["grouped", "all", "own"]
Dense = Callable[[jax.Array, jax.Array], jax.Array]
"""(x [..., in], weight [out, in]) -> [..., out]."""

BALANCE = {"cpu": 10}  # multiplications in the time it takes to read one number
ACCELERATED = 200
COPIES = 3  # a gathered adapter is read, written and read again

LEAST_RANK, MOST_RANK = 16, 128  # that the kernels take, powers of two: Triton multiplies no smaller matrices
MULTIPLE = 32  # of outputs in each part, and twice as many inputs, so that no tile is cut

_rows: ContextVar[jax.Array | None] = ContextVar("adapter_rows", default=None)


@contextmanager
def serving(rows: jax.Array | None) -> Iterator[None]:
    """Products traced inside are for ``rows`` [R]: the number of each row's adapter from 1 on, 0 for none.
    R is the first axis of their inputs. With None no row has one."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def choose(rows: int, tokens: int, a: Any, b: Any, parts: tuple[int, ...], platform: str) -> Way:
    """How ``rows`` of ``tokens`` each are multiplied: on a GPU by the kernels if these take such stacks, else
    by the numbers that are read or the time they leave."""
    largest = max(rows * tokens * max(b.shape[0], a.shape[2]), a.size, b.size)
    kernels = platform in ("gpu", "cuda") and b.dtype == jnp.bfloat16 and largest < 1 << 31
    if kernels and fits(a, b, parts):
        return "grouped"
    balance = BALANCE.get(platform, ACCELERATED)
    own, every = COPIES * rows, a.shape[0] * (1 + rows * tokens / balance)
    return "own" if own < every else "all"


def fits(a: Any, b: Any, parts: tuple[int, ...]) -> bool:
    """Whether the kernels take stacks of these shapes."""
    rank = b.shape[2]
    return (
        rank == stored_rank(rank, "gpu") <= MOST_RANK
        and a.shape[2] % (2 * MULTIPLE) == 0
        and all(size % MULTIPLE == 0 for size in parts)
    )


def stored_rank(rank: int, platform: str) -> int:
    """The rank of stacks for adapters of up to ``rank``: on a GPU one that the kernels take, if any is."""
    if platform not in ("gpu", "cuda") or rank > MOST_RANK:
        return rank
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


def add(
    y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, parts: tuple[int, ...], dense: Dense
) -> jax.Array:
    """A product's result ``y`` [..., out] and what the rows' adapters add to it.

    ``x`` is [R, in] or [R, C, in], ``a`` [adapters, P * rank, in] and ``b`` [out, adapters, rank], scale
    included: a fused product has an A for each of its P ``parts``, whose sizes add up to ``out``.
    """
    rows = _rows.get()
    if rows is None:
        return y
    wide = x.reshape(x.shape[0], -1, x.shape[-1])
    way = choose(wide.shape[0], wide.shape[1], a, b, parts, jax.default_backend())
    if way == "grouped":
        from llmos.drivers.jax.adapters import grouped

        tokens = jnp.repeat(rows, wide.shape[1])
        flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return grouped.add(*flat, tokens, a, b, parts).reshape(y.shape)
    # XLA would copy two weights that x is multiplied by into one, at every step, to multiply but once.
    wide = jax.lax.optimization_barrier(wide)  # type: ignore[no-untyped-call]
    run = _own if way == "own" else _all
    return y + run(wide, rows, a, b, parts, dense).reshape(y.shape)


def _all(
    x: jax.Array, rows: jax.Array, a: jax.Array, b: jax.Array, parts: tuple[int, ...], dense: Dense
) -> jax.Array:
    adapters, rank = b.shape[1:]
    inner = dense(x, a.reshape(-1, a.shape[-1]))
    inner = inner.reshape(*x.shape[:2], adapters, len(parts), rank)
    own = rows[:, None] == jnp.arange(1, adapters + 1)
    inner = jnp.where(own[:, None, :, None, None], inner, 0)
    pieces, at = [], 0
    for index, size in enumerate(parts):
        mine = inner[:, :, :, index].reshape(*x.shape[:2], adapters * rank)
        pieces.append(dense(mine, b[at : at + size].reshape(size, adapters * rank)))
        at += size
    return jnp.concatenate(pieces, axis=-1)


def _own(
    x: jax.Array, rows: jax.Array, a: jax.Array, b: jax.Array, parts: tuple[int, ...], dense: Dense
) -> jax.Array:
    rank, index = b.shape[2], jnp.maximum(rows - 1, 0)
    inner = _each("rci,rki->rck", x, a[index])
    inner = jnp.where((rows > 0)[:, None, None], inner, 0)
    outer, pieces, at = b[:, index], [], 0
    for part, size in enumerate(parts):
        mine = inner[..., part * rank : (part + 1) * rank]
        pieces.append(_each("rck,ork->rco", mine, outer[at : at + size]))
        at += size
    return jnp.concatenate(pieces, axis=-1)


def _each(form: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    exact: Any = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(form, x, weight, precision=exact, preferred_element_type=x.dtype)

"""Low-rank adapters (LoRA; Hu et al., 2021) in a product: ``x W' + x A' B'``, each row with its own A and B.

All adapters that are loaded lie stacked on the device, so that loading and dropping them changes values and
never a program. A batch's rows are multiplied in one of two ways, chosen when a program is traced:

- "all": every row with every adapter, two dense products with n * rank columns, and what is not a row's own
  is set to 0 in between. It reads each adapter once, however many rows there are, and costs n * rank * (in +
  out) multiplications a token: for 8 adapters of rank 16 about 6% of a 4,096 by 4,096 product. 256 rows that
  decode wait for weights to be read anyway, so that this is what it costs in bytes that counts.
- "own": each row with a copy of its own adapter, rank * (in + out) multiplications a token, the least there
  is; but the copies are written and read again, three times as many bytes for each row as an adapter has.

A row of many tokens (a prompt's chunk) is worth a copy, many rows of one token are not. After the grouped
products of Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023), which need kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp

Way = Literal["all", "own"]
Dense = Callable[[jax.Array, jax.Array], jax.Array]
"""(x [..., in], weight [out, in]) -> [..., out]."""

BALANCE = {"cpu": 10}  # multiplications in the time it takes to read one number
ACCELERATED = 200
COPIES = 3  # a gathered adapter is read, written and read again

_rows: ContextVar[jax.Array | None] = ContextVar("adapter_rows", default=None)


@contextmanager
def serving(rows: jax.Array | None) -> Iterator[None]:
    """Products traced inside are for ``rows`` [R]: the number of each row's adapter from 1 on, 0 for none.
    R is the first axis of their inputs."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def choose(rows: int, tokens: int, adapters: int, platform: str) -> Way:
    """How ``rows`` of ``tokens`` each are multiplied, by the numbers that are read or the time they leave."""
    balance = BALANCE.get(platform, ACCELERATED)
    own, every = COPIES * rows, adapters * (1 + rows * tokens / balance)
    return "own" if own < every else "all"


def delta(x: jax.Array, a: jax.Array, b: jax.Array, parts: tuple[int, ...], dense: Dense) -> jax.Array:
    """What the rows' adapters add to a product of ``x`` [R, in] or [R, C, in], [..., out]; 0 without one.

    ``a`` is [adapters, P * rank, in] and ``b`` [out, adapters, rank], scale included: a fused product has an
    A for each of its P ``parts``, whose sizes add up to ``out``.
    """
    rows = _rows.get()
    assert rows is not None, "a product with adapters is traced outside of lora.serving"
    wide = x.reshape(x.shape[0], -1, x.shape[-1])
    way = choose(wide.shape[0], wide.shape[1], a.shape[0], jax.default_backend())
    run = _own if way == "own" else _all
    added = run(wide, rows, a, b, parts, dense)
    return added.reshape(*x.shape[:-1], b.shape[0])


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

"""What adapters add to a product, in two Pallas (Triton) kernels: each token by its own adapter.

After the grouped products of Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023). A small product in
a decode step takes about as long as starting it, so that what counts is how many there are:

- ``_shrink`` multiplies tokens by A. A program takes a block of tokens, one part of a few adapters, and a
  split of the inputs; it writes the rows that are these adapters' own and ends at once if there are none. So
  what it writes, [parts, splits, tokens, rank], does not grow with the number of adapters.
- ``_expand`` joins the splits, spreads a token's values to the columns of its adapter, multiplies by B, and
  adds that to the product's result in place. It reads no adapter before the first or behind the last that a
  block of tokens has, and leaves alone what has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmos.drivers.jax.adapters.lora import LEAST_RANK, MULTIPLE, fits
from llmos.drivers.jax.decoder.modules import struct

TOKENS = 64  # of a program
COLUMNS = 128  # of B at a time
PROGRAMS = 132  # the multiprocessors of an H100 or H200
SPAN = 512  # inputs that are worth a program
MOST_SPLITS = 16


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: ``tokens`` for each program. Of the first kernel also ``beside`` adapters, which
    share what is read of x, and one of ``splits`` of the inputs, ``inner`` at a time; of the second ``outer``
    outputs, ``group`` adapters' columns of B at a time."""

    tokens: int
    beside: int
    splits: int
    inner: int
    outer: int
    group: int


def tiling(tokens: int, a: Any, b: Any, parts: tuple[int, ...]) -> Tiling:
    """Enough programs to keep all multiprocessors busy, where there is so much to do."""
    adapters, rank = b.shape[1:]
    rows = min(TOKENS, max(LEAST_RANK, 1 << (tokens - 1).bit_length()))
    blocks = pl.cdiv(tokens, rows)
    inner = 128 if a.shape[2] % 128 == 0 else 64
    wanted = min(MOST_SPLITS, a.shape[2] // SPAN, PROGRAMS // blocks)
    outer = 128
    while gcd(*parts) % outer or (outer > MULTIPLE and b.shape[0] // outer * blocks < PROGRAMS):
        outer //= 2
    splits = 1 << max(0, wanted.bit_length() - 1)
    group = beside = min(COLUMNS // rank, 1 << (adapters - 1).bit_length())
    while beside > 1 and pl.cdiv(adapters, beside) * len(parts) * splits * blocks < PROGRAMS // 4:
        beside //= 2
    return Tiling(rows, beside, splits, inner, outer, group)


def add(
    y: jax.Array,
    x: jax.Array,
    numbers: jax.Array,
    a: jax.Array,
    b: jax.Array,
    parts: tuple[int, ...],
    interpret: bool = False,
) -> jax.Array:
    """``y`` [T, out] and what the adapters ``numbers`` [T] (0: none) add to it for ``x`` [T, in].

    ``a`` and ``b`` are as in ``lora.add``. Raises ValueError where they do not fit together or ``fits`` not.
    """
    adapters, rank = b.shape[1:]
    wide = (adapters, len(parts) * rank, x.shape[1])
    if a.shape != wide or y.shape != (*x.shape[:1], sum(parts)) or not fits(a, b, parts):
        raise ValueError(f"y {y.shape}, x {x.shape}, A {a.shape}, B {b.shape}, parts {parts}")
    tile = tiling(x.shape[0], a, b, parts)
    blocks = pl.cdiv(x.shape[0], tile.tokens)
    warps = 4 if rank < COLUMNS else 8
    call = partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
    )
    inner = call(
        partial(_shrink, tile=tile),
        grid=(pl.cdiv(adapters, tile.beside) * len(parts), tile.splits, blocks),
        out_shape=struct((len(parts), tile.splits, x.shape[0], rank), jnp.float32),
        name="lora_shrink",
    )(numbers, x, a.reshape(adapters * len(parts), rank, -1))
    result: jax.Array = call(
        partial(_expand, tile=tile, parts=parts),
        grid=(b.shape[0] // tile.outer, blocks),
        out_shape=struct(y.shape, y.dtype),
        input_output_aliases={3: 0},
        name="lora_expand",
    )(numbers, inner, b.reshape(b.shape[0], -1), y)
    return result


def _shrink(
    numbers: Any,  # [T]
    x: Any,  # [T, in]
    a: Any,  # [adapters * parts, rank, in]
    inner: Any,  # [parts, splits, T, rank]
    *,
    tile: Tiling,
) -> None:
    parts, rank = inner.shape[0], a.shape[1]
    first, part, split = pl.program_id(0) // parts * tile.beside, pl.program_id(0) % parts, pl.program_id(1)
    tokens, real, number = _tokens(numbers, pl.program_id(2), tile)
    here = (number > first) & (number <= first + tile.beside)
    last = jnp.max(jnp.where(here, number, 0))
    least = jnp.min(jnp.where(here, number, last))

    def multiply(adapters: list[Any]) -> None:
        def step(at: Any, totals: Any) -> Any:
            columns = pl.ds(at * tile.inner, tile.inner)
            mask = jnp.broadcast_to(real[:, None], (tile.tokens, tile.inner))
            fed = plgpu.load(x.at[tokens, columns], mask=mask, other=0)
            weights = (a[(adapter - 1) * parts + part, :, columns] for adapter in adapters)
            return tuple(total + plgpu.dot(fed, own.T) for total, own in zip(totals, weights, strict=True))

        count = x.shape[1] // tile.inner
        share = pl.cdiv(count, tile.splits)
        zeros = (jnp.zeros((tile.tokens, rank), jnp.float32),) * len(adapters)
        end = jnp.minimum((split + 1) * share, count)
        made, *others = jax.lax.fori_loop(split * share, end, step, zeros)
        for adapter, other in zip(adapters[1:], others, strict=True):
            made = jnp.where((number == adapter)[:, None], other, made)
        mask = jnp.broadcast_to(here[:, None], made.shape)
        plgpu.store(inner.at[part, split, tokens, :], made, mask=mask)

    # All tokens of a prompt have one adapter, those of a batch that decodes have many.
    pl.when((last > 0) & (least == last))(lambda: multiply([last]))
    if tile.beside > 1:
        most = a.shape[0] // parts
        several = [jnp.minimum(first + 1 + index, most) for index in range(tile.beside)]
        pl.when(least < last)(lambda: multiply(several))


def _expand(
    numbers: Any,  # [T]
    inner: Any,  # [parts, splits, T, rank]
    b: Any,  # [out, adapters * rank]
    y: Any,  # [T, out]
    result: Any,  # y itself
    *,
    tile: Tiling,
    parts: tuple[int, ...],
) -> None:
    rank, first = inner.shape[3], pl.program_id(0) * tile.outer
    tokens, real, number = _tokens(numbers, pl.program_id(1), tile)
    outputs, width = pl.ds(first, tile.outer), tile.group * rank
    last = jnp.max(number)
    begin = jnp.min(jnp.where(number > 0, number, last)) - 1

    @pl.when(last > 0)
    def _() -> None:
        mask = jnp.broadcast_to((number > 0)[:, None], (tile.tokens, rank))
        part = _part(first, parts)
        pieces = (inner.at[part, jnp.int32(split), tokens, :] for split in range(tile.splits))
        own = reduce(jnp.add, (plgpu.load(piece, mask=mask, other=0) for piece in pieces))
        spread = jnp.broadcast_to(own[:, None, :], (tile.tokens, tile.group, rank)).reshape(-1, width)

        def step(group: Any, total: Any) -> Any:
            column = group * width + jnp.arange(width)
            mine = jnp.where(number[:, None] == (column // rank + 1)[None, :], spread, 0).astype(y.dtype)
            mask = jnp.broadcast_to((column < b.shape[1])[None, :], (tile.outer, width))
            part = plgpu.load(b.at[outputs, pl.ds(group * width, width)], mask=mask, other=0)
            return total + plgpu.dot(mine, part.T)

        zero = jnp.zeros((tile.tokens, tile.outer), jnp.float32)
        added = jax.lax.fori_loop(begin // tile.group, pl.cdiv(last, tile.group), step, zero)
        mask = jnp.broadcast_to(real[:, None], added.shape)
        base = plgpu.load(y.at[tokens, outputs], mask=mask, other=0)
        plgpu.store(result.at[tokens, outputs], (base + added).astype(y.dtype), mask=mask)


def _tokens(numbers: Any, block: Any, tile: Tiling) -> tuple[Any, Any, Any]:
    """The tokens of a program, which of them there are, and their adapters."""
    real = block * tile.tokens + jnp.arange(tile.tokens) < numbers.shape[0]
    tokens = pl.ds(block * tile.tokens, tile.tokens)
    return tokens, real, plgpu.load(numbers.at[tokens], mask=real, other=0)


def _part(output: Any, parts: tuple[int, ...]) -> Any:
    """Which of the parts an output belongs to."""
    index, bound = jnp.int32(0), 0
    for size in parts[:-1]:
        bound += size
        index += (output >= bound).astype(jnp.int32)
    return index

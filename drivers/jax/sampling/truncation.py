"""Top-k, then top-p (Holtzman et al., 2020) of what is left: the least logit that is kept in each row.

Nothing is sorted. The cut is where the mass of all that is not less, a count or a sum of probabilities, still
suffices: ``everywhere`` finds it by bisection over the bits of the logits, in 32 passes each. On a GPU a
kernel looks at ``TRIALS`` places in a pass, and stops when one logit is left between two of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmos.drivers.jax.decoder.modules import struct

TRIALS = 8
BLOCK = 2048  # logits that are looked at together
WARPS = 8
_NEAR = 128.0  # the first places are half so far below the top, a quarter and so on; the next so much farther
_LEAST = 0x007FFFFF  # the image of -inf


def kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """``logits`` [B, vocab], float32, with -inf for what is cut.

    Kept are the ``top_k`` [B] largest (0: all), and of these the largest that together have the share
    ``top_p`` [B] of their probability (1: all): always one, and all that equal the least of them.
    """
    cut = on_gpu if jax.default_backend() == "gpu" else everywhere
    return jnp.where(logits >= cut(logits, top_k, top_p)[:, None], logits, -jnp.inf)


def everywhere(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The least logit [B] that is kept, on any device."""
    vocab = logits.shape[-1]
    order = _ordered(logits)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab).astype(jnp.float32)
    least = _threshold(order, jnp.ones_like(logits), count)
    probability = jax.nn.softmax(jnp.where(order >= least[:, None], logits, -jnp.inf), axis=-1)
    wanted = jnp.maximum(top_p * jnp.sum(probability, axis=-1), jnp.max(probability, axis=-1))
    likely = _threshold(order, probability, wanted)
    return _value(jnp.where(top_p < 1.0, jnp.maximum(likely, least), least))


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 image of float32 that sorts as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _value(order: jax.Array) -> jax.Array:
    """The float32 of an image; -inf for what is less than any."""
    sign, order = jnp.uint32(1 << 31), jnp.maximum(order, jnp.uint32(_LEAST))
    bits = jnp.where(order >= sign, order ^ sign, ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _threshold(order: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest uint32 t [B] for which the ``weight`` of all elements ``>= t`` is at least ``wanted``."""

    def bit(index: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= trial[:, None], weight, 0.0), axis=-1)
        return jnp.where(mass >= wanted, trial, found)

    found: jax.Array = jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))
    return found


def on_gpu(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, interpret: bool = False) -> jax.Array:
    """As ``everywhere``, by a Pallas (Triton) kernel with a program for each row.

    One pass over the row tells at ``TRIALS`` places how much is above them, and so which logits may be the
    cut. These are put aside, and the search goes on among them for as many passes as the row takes.
    """
    rows, vocab = logits.shape
    one, row = pl.BlockSpec((1,), lambda row: (row,)), pl.BlockSpec((None, vocab), lambda row: (row, 0))
    cut, _ = pl.pallas_call(
        partial(_kernel, barrier=not interpret),
        grid=(rows,),
        in_specs=[row, one, one, one],
        out_specs=[one, row],
        out_shape=[struct((rows,), jnp.float32), struct((rows, vocab), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="truncation",
    )(logits, jnp.max(logits, axis=-1), top_k, top_p)
    found: jax.Array = cut
    return found


class Bracket(NamedTuple):
    """Where a cut is: from ``low`` on the mass suffices, from ``high`` on it does not.

    ``inside`` logits are not less than ``low``, and ``above`` not less than ``high``; ``moved`` says whether
    the last places were of any use.
    """

    low: Any
    high: Any
    inside: Any
    above: Any
    moved: Any

    def narrowed(self, places: Any, mass: Any, count: Any, wanted: Any) -> Bracket:
        """As the places [TRIALS] tell, above which there are ``mass`` and ``count``."""
        enough = mass >= wanted
        low, high = jnp.where(enough, places, self.low).max(), jnp.where(enough, self.high, places).min()
        inside = jnp.where(enough, count, jnp.inf).min()
        above = jnp.where(enough, self.above, count).max()
        return Bracket(low, high, inside, above, (low > self.low) | (high < self.high))


def _kernel(logits: Any, tops: Any, top_k: Any, top_p: Any, cut: Any, aside: Any, *, barrier: bool) -> None:
    vocab, top, share = logits.shape[0], tops[0], top_p[0]
    number = top_k[0].astype(jnp.float32)
    # What has no finite logit fails later, and is not searched.
    finite = jnp.abs(top) < jnp.inf
    counted, shared = finite & (number > 0), finite & (share < 1.0)
    nothing, most = jnp.float32(0), jnp.float32(vocab)
    whole = Bracket(nothing - jnp.inf, top + 1, most, nothing, finite)
    places = _below(whole.high, jnp.float32(1))
    mass, count = _masses(logits, vocab, top, places, True)
    by_count = whole.narrowed(places, count, count, number)
    by_mass = whole.narrowed(places, mass, count, jnp.maximum(share * mass.max(), 1.0))
    low = jnp.where(counted, by_count.low, jnp.where(shared, by_mass.low, jnp.inf))
    held = _put_aside(logits, aside, low)
    if barrier:
        plgpu.debug_barrier()
    search = partial(_search, aside, held, top)
    least = jnp.where(counted, search(number, by_count, False, counted), -jnp.inf)
    left = _masses(aside, held, top, jnp.zeros((TRIALS,), jnp.float32) + least, True)[0].max()
    wanted = jnp.maximum(share * jnp.where(counted, left, mass.max()), 1.0)
    begin = Bracket(*(jnp.where(counted, x, y) for x, y in zip(whole._replace(low=least), by_mass)))
    likely = jnp.where(shared, search(wanted, begin, True, shared), -jnp.inf)
    cut[0] = jnp.maximum(least, likely)


def _search(row: Any, held: Any, top: Any, wanted: Any, begin: Bracket, likely: bool, asked: Any) -> Any:
    """The largest place above which the mass of the ``held`` logits in ``row`` suffices."""

    def going(state: Any) -> Any:
        bracket = Bracket(*state[0])
        return asked & bracket.moved & (bracket.inside - bracket.above > 1)

    def closer(state: Any) -> Any:
        bracket, step = Bracket(*state[0]), state[1]
        evenly = bracket.low + (bracket.high - bracket.low) * (
            jnp.arange(TRIALS).astype(jnp.float32) / TRIALS
        )
        places = jnp.where(bracket.low > -jnp.inf, evenly, _below(bracket.high, step))
        mass, count = _masses(row, held, top, places, likely)
        return tuple(bracket.narrowed(places, mass, count, wanted)), step * _NEAR

    return jax.lax.while_loop(going, closer, (tuple(begin), jnp.float32(_NEAR)))[0][0]


def _below(high: Any, step: Any) -> Any:
    """``TRIALS`` places below ``high``, the first of which is below everything."""
    index = jnp.arange(TRIALS).astype(jnp.float32)
    return jnp.where(index == 0, -jnp.inf, high - step * _NEAR * jnp.exp2(-index))


def _masses(row: Any, held: Any, top: Any, places: Any, likely: bool) -> tuple[Any, Any]:
    """Of the logits that are not less than each of ``places``: their mass, and how many there are."""

    def add(place: Any, x: Any, sums: Any) -> Any:
        inside = x[None, :] >= places[:, None]
        count = sums[1] + jnp.where(inside, 1.0, 0.0)
        mass = sums[0] + jnp.where(inside, jnp.exp(x - top)[None, :], 0.0) if likely else count
        return mass, count

    zero = jnp.zeros((TRIALS, BLOCK), jnp.float32)
    mass, count = _over(row, held, (zero, zero), add)
    return mass.sum(axis=1), count.sum(axis=1)


def _put_aside(row: Any, aside: Any, low: Any) -> Any:
    """Write the logits that are not less than ``low`` to the beginning of ``aside``; how many there are."""

    def put(place: Any, x: Any, held: Any) -> Any:
        chosen = x >= low
        order = jnp.cumsum(chosen.astype(jnp.int32))
        plgpu.store(aside.at[jnp.where(chosen, held + order - 1, row.shape[0])], x, mask=chosen)
        return held + order.max()

    return _over(row, row.shape[0], jnp.int32(0), put)


def _over(row: Any, held: Any, start: Any, add: Any) -> Any:
    """Fold the first ``held`` of a row by blocks; what is past them is not a number, and counts nowhere."""

    def block(index: Any, state: Any) -> Any:
        place = index * BLOCK + jnp.arange(BLOCK)
        return add(place, plgpu.load(row.at[place], mask=place < held, other=jnp.nan), state)

    return jax.lax.fori_loop(0, pl.cdiv(held, BLOCK), block, start)

"""The batch on the device: one row per slot, and the small programs that admit sequences to it.

Every array has ``slots + 1`` rows; the last one is a spare that padding rows point at and that is never
live. Table entries that hold no page yet point at the cache's last page, which stays zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.sdk.checks import BIAS_LIMIT, STOP_LIMIT
from llmos.drivers.sdk.messages import Sampling, Start


class Choice(NamedTuple):
    """Sampling parameters by slot, each [slots + 1]; the names are those of ``Sampling``."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any


class BatchState(NamedTuple):
    """What the device knows of every slot.

    ``token`` [slots + 1] is the last token, whose KV is not written yet; ``length`` counts the tokens
    including it; ``live`` is false once the sequence has finished; ``limit`` is the length to finish at;
    ``stop`` [slots + 1, STOP_LIMIT] is padded with -1; ``tables`` is [slots + 1, width]; ``adapter`` is the
    number of an adapter or 0, and None for a model without adapters.
    """

    token: jax.Array
    length: jax.Array
    live: jax.Array
    limit: jax.Array
    stop: jax.Array
    tables: jax.Array
    choice: Choice
    adapter: jax.Array | None = None


class Tallies(NamedTuple):
    """Token counts for penalties and biases; made only once a sequence asks for them.

    ``output`` int32 and ``prompt`` bool are [slots + 1, vocab]; ``bias_ids`` and ``bias`` are
    [slots + 1, BIAS_LIMIT], unused ids being out of range.
    """

    output: jax.Array
    prompt: jax.Array
    bias_ids: jax.Array
    bias: jax.Array


_CHOICE_TYPES = {"top_k": np.int32, "seed": np.uint32}
_FLOAT_FIELDS = tuple(name for name in Choice._fields if name not in _CHOICE_TYPES)
_INTS = 6


def pack_choices(sampling: list[Sampling]) -> Choice:
    """Sampling parameters of n sequences as arrays [n]."""
    return Choice(
        *(
            np.asarray([getattr(item, name) for item in sampling], _CHOICE_TYPES.get(name, np.float32))
            for name in Choice._fields
        )
    )


def empty_state(slots: int, width: int, spare_page: int, adapters: bool = False) -> BatchState:
    """A batch in which nothing is live."""
    rows = slots + 1
    return BatchState(
        token=jnp.zeros(rows, jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        live=jnp.zeros(rows, bool),
        limit=jnp.zeros(rows, jnp.int32),
        stop=jnp.full((rows, STOP_LIMIT), -1, jnp.int32),
        tables=jnp.full((rows, width), spare_page, jnp.int32),
        choice=Choice(*(jnp.array(x) for x in pack_choices([Sampling()] * rows))),
        adapter=jnp.zeros(rows, jnp.int32) if adapters else None,
    )


def empty_tallies(slots: int, vocab: int) -> Tallies:
    rows = slots + 1
    return Tallies(
        output=jnp.zeros((rows, vocab), jnp.int32),
        prompt=jnp.zeros((rows, vocab), bool),
        bias_ids=jnp.full((rows, BIAS_LIMIT), vocab, jnp.int32),
        bias=jnp.zeros((rows, BIAS_LIMIT), jnp.float32),
    )


def pack_admission(
    starts: list[Start],
    rows: int,
    spare_slot: int,
    table: list[list[int]],
    adapters: list[int] | None = None,
) -> Any:
    """Sequences to admit as two arrays with ``rows`` rows, since each array costs a transfer of its own.

    Integers: slot, live, length, limit, top_k, seed, stop tokens, block table; ``table`` [rows, width] holds
    the spare page where there is none; and the numbers in ``adapters`` for a model that can have some.
    Floats: the other fields of ``Choice``.
    """
    ints = np.full((rows, _INTS + STOP_LIMIT + len(table[0])), -1, np.int32)
    ints[:, :_INTS] = (spare_slot, 0, 0, 0, 0, 0)
    ints[:, _INTS + STOP_LIMIT :] = table
    if adapters is not None:
        ints = np.concatenate([ints, np.zeros((rows, 1), np.int32)], axis=1)
        ints[: len(adapters), -1] = adapters
    floats = np.ones((rows, len(_FLOAT_FIELDS)), np.float32)
    for row, start in enumerate(starts):
        seed = np.uint32(start.sampling.seed).view(np.int32)
        ints[row, :_INTS] = (start.slot, 1, len(start.tokens), start.limit, start.sampling.top_k, seed)
        ints[row, _INTS : _INTS + len(start.stop)] = start.stop
        floats[row] = [getattr(start.sampling, name) for name in _FLOAT_FIELDS]
    return ints, floats


def admit(state: BatchState, ints: jax.Array, floats: jax.Array) -> BatchState:
    """Write the rows of ``pack_admission``; their last tokens come with the chunk that completes a prompt."""
    slots, live, length, limit, top_k, seed = (ints[:, column] for column in range(_INTS))

    def put(old: jax.Array, value: Any) -> jax.Array:
        return old.at[slots].set(value)

    tables = _INTS + STOP_LIMIT
    choice = dict(zip(_FLOAT_FIELDS, floats.T, strict=True))
    choice |= {"top_k": top_k, "seed": jax.lax.bitcast_convert_type(seed, jnp.uint32)}
    return BatchState(
        token=state.token,
        length=put(state.length, length),
        live=put(state.live, live > 0),
        limit=put(state.limit, limit),
        stop=put(state.stop, ints[:, _INTS : _INTS + STOP_LIMIT]),
        tables=put(state.tables, ints[:, tables : tables + state.tables.shape[1]]),
        choice=jax.tree.map(put, state.choice, Choice(**choice)),
        adapter=None if state.adapter is None else put(state.adapter, ints[:, -1]),
    )


def grow(state: BatchState, slots: jax.Array, columns: jax.Array, pages: jax.Array) -> BatchState:
    """Put ``pages`` [n] at (slot, column) [n] of the block tables; slots out of range are padding."""
    return state._replace(tables=state.tables.at[slots, columns].set(pages, mode="drop"))


def tally(
    tallies: Tallies,
    slot: jax.Array,
    tokens: jax.Array,
    prompt: jax.Array,
    known: jax.Array,
    bias_ids: jax.Array,
    bias: jax.Array,
) -> Tallies:
    """Count a new sequence's ``tokens`` [max_context]: the first ``prompt`` of ``known`` are its prompt."""
    vocab = tallies.output.shape[1]
    place = jnp.arange(tokens.shape[0])
    asked = jnp.where(place < prompt, tokens, vocab)
    given = jnp.where((place >= prompt) & (place < known), tokens, vocab)
    return Tallies(
        output=tallies.output.at[slot].set(jnp.zeros(vocab, jnp.int32).at[given].add(1, mode="drop")),
        prompt=tallies.prompt.at[slot].set(jnp.zeros(vocab, bool).at[asked].set(True, mode="drop")),
        bias_ids=tallies.bias_ids.at[slot].set(bias_ids),
        bias=tallies.bias.at[slot].set(bias),
    )

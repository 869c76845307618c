"""Speculative decoding on the device: guess tokens from the sequence's own past, verify, keep what holds.

Proposals come by prompt lookup (Saxena, 2023): the tokens that followed the latest earlier occurrence of the
last few tokens. Verification is exact (Leviathan et al., 2023, with a stronger outcome): the token at a
position is a function of the logits and of noise keyed by (seed, position), so what a sequence would sample
at each guessed position is computed with that position's own noise, and the guesses are kept as far as they
are equal to it. The tokens are those of plain decoding, not only their distribution.

Proposing, verifying and accepting happen in the dispatched programs, so no step waits for the host. A row
whose pages are full holds still: the host, which learns of accepted tokens later, then has to grow it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution.state import BatchState, Choice, Tallies
from llmos.drivers.jax.sampling.sampling import Variant, choose
from llmos.drivers.jax.sharding.collectives import Columns

NGRAM = 3


class History(NamedTuple):
    """The ``tokens`` of every slot, int32 [slots + 1, max_context], and how many the draft model has seen.

    A slot's last token may be missing until the next step; ``drafted`` is int32 [slots + 1].
    """

    tokens: jax.Array
    drafted: jax.Array


class Guess(NamedTuple):
    """``tokens`` [B, n] are guessed to follow the last token of each row; ``counts`` [B] are to be verified.

    A row that holds still has -1. ``known`` [B] says whether there is a guess at all: the first may be
    compared with what is sampled even where none is verified.
    """

    tokens: jax.Array
    counts: jax.Array
    known: jax.Array


def no_guess(rows: int, tokens: int) -> Guess:
    """That of a batch in which every row holds still."""
    none = jnp.zeros((rows, max(tokens, 1)), jnp.int32)
    return Guess(none, jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, bool))


def empty_history(slots: int, max_context: int) -> History:
    """That of a batch in which no sequence has been."""
    return History(jnp.zeros((slots + 1, max_context), jnp.int32), jnp.zeros(slots + 1, jnp.int32))


def recall(history: History, slots: jax.Array, tokens: jax.Array) -> History:
    """Put the ``tokens`` [n, max_context] of new sequences into ``slots`` [n]; out of range is padding."""
    return History(
        history.tokens.at[slots].set(tokens, mode="drop"), history.drafted.at[slots].set(0, mode="drop")
    )


def look_up(history: jax.Array, length: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Guess ``tokens`` from ``history`` [B, max_context], of which ``length`` [B] tokens are known.

    The longest match of up to ``NGRAM`` last tokens counts, of equals the latest. Where fewer tokens follow
    it than are wanted, they are repeated, for then the sequence goes in a circle. Returns the guesses
    [B, tokens] and whether there was a match [B].
    """
    place = jnp.arange(history.shape[1])
    at = (length - 1)[:, None]
    matching = place < at
    score = jnp.zeros(history.shape, jnp.int32)
    for back in range(NGRAM):
        wanted = jnp.take_along_axis(history, jnp.maximum(at - back, 0), axis=1)
        matching &= (jnp.roll(history, back, axis=1) == wanted) & (place >= back)
        score += matching
    best = jnp.argmax(score * history.shape[1] + place, axis=1)[:, None]
    period = jnp.maximum(at - best, 1)
    index = best + 1 + jnp.arange(tokens) % period
    return jnp.take_along_axis(history, index, axis=1, mode="clip"), jnp.max(score, axis=1) > 0


def step(
    shape: Shape,
    tokens: int,
    weights: Any,
    caches: list[Any],
    state: BatchState,
    history: History,
    rows: jax.Array,
) -> tuple[list[Any], jax.Array, Guess]:
    """Guess for the slots ``rows`` [B] and compute what decides on it: the last token and ``tokens`` more.

    Returns the caches, float32 logits [B, tokens + 1, vocab], and the guess.
    """
    guesses, known = look_up(past_of(history, state, rows), state.length[rows], max(tokens, 1))
    guess = Guess(guesses, allowed(shape, state, rows, known, tokens), known)
    return (*verify(shape, weights, caches, state, rows, guess, tokens), guess)


def past_of(history: History, state: BatchState, rows: jax.Array) -> jax.Array:
    """All tokens of the slots ``rows`` [B], the last one included: [B, max_context]."""
    past = history.tokens[rows]
    return past.at[jnp.arange(rows.shape[0]), state.length[rows] - 1].set(state.token[rows], mode="drop")


def verify(
    shape: Shape,
    weights: Any,
    caches: list[Any],
    state: BatchState,
    rows: jax.Array,
    guess: Guess,
    tokens: int,
) -> tuple[list[Any], jax.Array]:
    """Feed the last tokens and the first ``tokens`` guesses; the caches and logits [B, tokens + 1, vocab]."""
    counts = guess.counts
    if tokens:
        fed = jnp.concatenate([state.token[rows][:, None], guess.tokens], axis=1)
        return forward.verify(shape, weights, caches, state, rows, fed, counts + 1)
    moving = state._replace(live=state.live.at[rows].set(counts >= 0))
    caches, logits = forward.decode(shape, weights, caches, moving, rows)
    return caches, logits[:, None]


def allowed(shape: Shape, state: BatchState, rows: jax.Array, known: jax.Array, tokens: int) -> jax.Array:
    """How many guesses fit in the pages and under the limit; -1 where not even the last token does."""
    spare = shape.pages - 1
    room = jnp.sum(state.tables[rows] != spare, axis=1) * shape.page_tokens - state.length[rows]
    left = jnp.minimum(state.limit[rows] - state.length[rows] - 1, tokens)
    counts = jnp.where(known, jnp.clip(room, 0, jnp.maximum(left, 0)), 0)
    return jnp.where(state.live[rows] & (room >= 0), counts, -1)


def accept(
    variant: Variant,
    columns: Columns,
    logits: jax.Array,
    guess: Guess,
    rows: jax.Array,
    state: BatchState,
    history: History,
    tallies: Tallies | None,
) -> tuple[BatchState, History, Tallies | None, jax.Array]:
    """Sample after each of the fed tokens, and keep the samples as long as the guesses before are right.

    ``logits`` is [B, C, vocab], cut by ``columns``. With the variant "full" C is 1: penalties count the
    tokens before. Returns the state, the history, the tallies, and int32 [C + 3, B]: C tokens, -1 from the
    first on that was not produced; how the sequence finished; the guesses that were put to the test; and
    those that were right.
    """
    verdict = _judge(variant, columns, logits, guess, rows, state, tallies)
    token, made, reason = verdict.tokens, verdict.made, verdict.reason
    length, gained = state.length[rows], jnp.sum(verdict.made, axis=1)
    last = jnp.take_along_axis(token, jnp.maximum(gained - 1, 0)[:, None], axis=1)[:, 0]
    token = jnp.where(made, token, -1)
    asked = (guess.counts >= 0) & (logits.shape[1] > 1)
    drafted = jnp.where(asked, length + gained - 1, history.drafted[rows])
    history = History(_remember(history.tokens, rows, state, token), history.drafted.at[rows].set(drafted))
    if tallies is not None:
        counted = tallies.output.at[rows, verdict.tokens[:, 0]].add(made[:, 0].astype(jnp.int32))
        tallies = tallies._replace(output=counted)
    state = state._replace(
        token=state.token.at[rows].set(jnp.where(gained > 0, last, state.token[rows])),
        length=state.length.at[rows].set(length + gained),
        live=state.live.at[rows].set(state.live[rows] & (reason == 0)),
    )
    results = [token.T, reason[None], *_score(verdict, guess, gained)]
    return state, history, tallies, jnp.concatenate(results).astype(jnp.int32)


class _Verdict(NamedTuple):
    """Sampled ``tokens`` [B, C], which were ``made``, which guesses are ``right``, and a row's ``reason``."""

    tokens: jax.Array
    made: jax.Array
    right: jax.Array
    reason: jax.Array


def _judge(
    variant: Variant,
    columns: Columns,
    logits: jax.Array,
    guess: Guess,
    rows: jax.Array,
    state: BatchState,
    tallies: Any,
) -> _Verdict:
    """A token is made if its logits are sound, and all guesses before it are right and none is an end."""
    tokens = logits.shape[1] - 1
    position = state.length[rows][:, None] + jnp.arange(tokens + 1)
    token = _sampled(variant, columns, logits, rows, position, state, tallies)
    stopped = jnp.any(state.stop[rows][:, None] == token[..., None], axis=-1)
    ends = jnp.where(stopped, 1, jnp.where(position + 1 >= state.limit[rows][:, None], 2, 0))
    sound = token >= 0
    ends = jnp.where(sound, ends, 3)
    right = token[:, : guess.tokens.shape[1]] == guess.tokens
    offered = jnp.arange(tokens) < guess.counts[:, None]
    follows = right[:, :tokens] & offered & (ends[:, :-1] == 0)
    reached = jnp.concatenate([(guess.counts >= 0)[:, None], follows], axis=1)
    reached = jnp.cumprod(reached, axis=1) > 0
    return _Verdict(token, reached & sound, right, jnp.max(jnp.where(reached, ends, 0), axis=1))


def _score(verdict: _Verdict, guess: Guess, gained: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many guesses of each row were put to the test, and how many were right: [1, B] each.

    Having none to offer counts as one that was wrong; being cut short by the end of the sequence does not.
    """
    if verdict.tokens.shape[1] > 1:
        hits = jnp.maximum(gained - 1, 0)
        short = hits < guess.counts
    else:
        hits = gained * (guess.known & verdict.right[:, 0])
        short = hits < gained
    missed = (guess.counts >= 0) & (verdict.reason == 0) & (short | ~guess.known)
    return (hits + missed)[None], hits[None]


def _sampled(
    variant: Variant,
    columns: Columns,
    logits: jax.Array,
    rows: jax.Array,
    position: jax.Array,
    state: BatchState,
    tallies: Tallies | None,
) -> jax.Array:
    """The token [B, C] that each row would sample at each ``position`` [B, C]; see ``choose``."""
    wide = position.shape[1]
    choice = Choice(*(jnp.repeat(field[rows], wide) for field in state.choice))
    flat = logits.reshape(-1, logits.shape[-1])
    counted = Tallies(*(field[rows] for field in tallies)) if tallies is not None else None
    return choose(variant, flat, choice, position.reshape(-1), columns, counted).reshape(position.shape)


def _remember(history: jax.Array, rows: jax.Array, state: BatchState, made: jax.Array) -> jax.Array:
    """Write the last token and those ``made`` [B, C] after it; what is -1 is not written."""
    length = state.length[rows][:, None]
    tokens = jnp.concatenate([state.token[rows][:, None], made], axis=1)
    place = length - 1 + jnp.arange(tokens.shape[1])
    place = jnp.where((tokens >= 0) & (place >= 0), place, history.shape[1])
    return history.at[rows[:, None], place].set(tokens, mode="drop")

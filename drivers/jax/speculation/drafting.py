"""Guesses by a draft model: a smaller one with the same vocabulary (Leviathan et al., 2023).

Its KV lies in pages of its own under the same block tables. It reads what it has not seen of a sequence (the
prompt, a prefix that came from the cache, tokens of plain steps) from the history when it is next asked, so
that nobody else has to know of it, and while it is not asked it costs nothing. It samples with the noise of
the very positions that are verified, which makes it agree with the model also at temperatures above zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution.state import BatchState
from llmos.drivers.jax.sampling.sampling import choose
from llmos.drivers.jax.speculation.verification import Guess, History, allowed, past_of, verify

CHUNK = 64  # tokens that the draft model reads at once of what it has not seen


def step(
    shape: Shape,
    draft: Shape,
    tokens: int,
    weights: Any,
    caches: list[Any],
    state: BatchState,
    history: History,
    rows: jax.Array,
    draft_weights: Any,
    draft_caches: list[Any],
) -> tuple[list[Any], list[Any], jax.Array, Guess]:
    """As ``verification.step``; returns the caches of both models, the logits and the guess."""
    known = jnp.ones(rows.shape, bool)
    counts = allowed(shape, state, rows, known, tokens)
    mine: BatchState = jax.tree.map(lambda field: field[rows], state)
    seen = jnp.where(counts >= 0, history.drafted[rows], mine.length)
    draft_caches = _catch_up(draft, draft_weights, draft_caches, mine, past_of(history, state, rows), seen)
    draft_caches, guesses = _guess(draft, tokens, draft_weights, draft_caches, mine, counts)
    guess = Guess(guesses, counts, known)
    caches, logits = verify(shape, weights, caches, state, rows, guess, tokens)
    return caches, draft_caches, logits, guess


def _catch_up(
    shape: Shape, weights: Any, caches: list[Any], mine: BatchState, past: jax.Array, seen: jax.Array
) -> list[Any]:
    """Compute the KV of the tokens between ``seen`` [B] and the last one of ``past`` [B, max_context]."""
    until, width = mine.length - 1, mine.tables.shape[1]

    def behind(carry: tuple[list[Any], jax.Array]) -> jax.Array:
        return jnp.any(carry[1] < until)

    def read(carry: tuple[list[Any], jax.Array]) -> tuple[list[Any], jax.Array]:
        caches, at = carry
        counts = jnp.clip(until - at, 0, CHUNK)
        fed = jnp.take_along_axis(past, at[:, None] + jnp.arange(CHUNK), axis=1, mode="clip")
        chunk = jnp.concatenate([at[:, None], counts[:, None], mine.tables, fed], axis=1)
        caches, _ = forward.prefill(shape, False, width, weights, caches, chunk)
        return caches, at + counts

    caches, _ = jax.lax.while_loop(behind, read, (caches, seen))
    return caches


def _guess(
    shape: Shape, tokens: int, weights: Any, caches: list[Any], mine: BatchState, counts: jax.Array
) -> tuple[list[Any], jax.Array]:
    """``tokens`` guesses [B, tokens] one after another; the last is fed too, in case that all are right."""
    rows = jnp.arange(counts.shape[0])

    def ask(index: jax.Array, carry: tuple[list[Any], jax.Array, jax.Array]) -> Any:
        caches, token, guesses = carry
        length = mine.length + index
        now = mine._replace(token=token, length=length, live=index <= counts)
        caches, logits = forward.decode(shape, weights, caches, now, rows)
        token = choose("plain", logits, mine.choice, length, shape.vocabulary)
        return caches, token, guesses.at[:, index].set(token)

    start = (caches, mine.token, jnp.zeros((counts.shape[0], tokens + 1), jnp.int32))
    caches, _, guesses = jax.lax.fori_loop(0, tokens + 1, ask, start)
    return caches, guesses[:, :tokens]

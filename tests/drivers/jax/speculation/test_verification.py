"""What is guessed from a sequence's past, and what of it is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.execution.state import BatchState, empty_state
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.jax.speculation.verification import Guess, accept, empty_history, look_up

STALE = [1, 2, 3, 9, 9, 9, 9]
"""What an earlier sequence left in the slot; it would match."""


def guess(tokens: list[int], count: int) -> list[int] | None:
    """The guesses after these tokens, or None where there was no match."""
    padded = jnp.asarray([(tokens + STALE + [0] * 32)[:32]], jnp.int32)
    found, known = look_up(padded, jnp.asarray([len(tokens)], jnp.int32), count)
    return found[0].tolist() if known[0] else None


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6]),
        ([2, 3, 7, 7, 7, 1, 2, 3, 4, 4, 4, 9, 2, 3, 5, 5, 5, 1, 2, 3], [4, 4, 4]),
        ([3, 4, 4, 4, 3, 5, 5, 5, 3], [5, 5, 5]),
        ([8, 1, 2, 1, 2], [1, 2, 1]),
        ([7, 7], [7, 7, 7]),
        ([1, 2, 3], None),
        ([5], None),
    ],
    ids=["follows", "longest", "latest", "circle", "same", "nothing", "one"],
)
def test_the_tokens_that_followed_the_longest_latest_match_are_guessed(
    tokens: list[int], expected: list[int] | None
) -> None:
    assert guess(tokens, 3) == expected


def batch(limit: int = 20, stop: int = -1) -> BatchState:
    """One greedy sequence of 5 tokens in slot 0."""
    state = empty_state(slots=1, width=4, spare_page=9)
    return state._replace(
        token=state.token.at[0].set(5),
        length=state.length.at[0].set(5),
        live=state.live.at[0].set(True),
        limit=state.limit.at[0].set(limit),
        stop=state.stop.at[0, 0].set(stop),
    )


def kept(state: BatchState, counts: int, nonsense: int = -1) -> tuple[list[int], list[int], BatchState]:
    """Guesses 1, 2, 3 where the model says 1, 2, 7, 4: kept, [reason, tested, right], the state."""
    logits = np.zeros((1, 4, 10), np.float32)
    logits[0, np.arange(4), [1, 2, 7, 4]] = 1.0
    if nonsense >= 0:
        logits[0, nonsense] = np.nan
    made = Guess(jnp.asarray([[1, 2, 3]]), jnp.asarray([counts]), jnp.asarray([True]))
    rows, history = jnp.asarray([0]), empty_history(1, 32)
    columns = Columns(logits.shape[-1])
    state, history, _, packed = accept(
        "greedy", columns, jnp.asarray(logits), made, rows, state, history, None
    )
    *tokens, reason, tested, right = packed[:, 0].tolist()
    found = [token for token in tokens if token >= 0]
    assert history.tokens[0, 4 : 5 + len(found)].tolist() == [5, *found]
    return found, [reason, tested, right], state


def test_samples_are_kept_as_long_as_the_guesses_before_are_right() -> None:
    tokens, verdict, state = kept(batch(), 3)
    assert tokens == [1, 2, 7]
    assert verdict == [0, 3, 2]
    assert (int(state.token[0]), int(state.length[0]), bool(state.live[0])) == (7, 8, True)


def test_guesses_that_are_not_offered_are_not_kept() -> None:
    assert kept(batch(), 1)[:2] == ([1, 2], [0, 1, 1])
    assert kept(batch(), 0)[:2] == ([1], [0, 0, 0])


def test_a_row_that_holds_still_changes_nothing() -> None:
    tokens, verdict, state = kept(batch(), -1)
    assert (tokens, verdict) == ([], [0, 0, 0])
    assert (int(state.token[0]), int(state.length[0]), bool(state.live[0])) == (5, 5, True)


def test_the_first_end_counts() -> None:
    assert kept(batch(stop=2), 3)[:2] == ([1, 2], [1, 1, 1])
    tokens, verdict, state = kept(batch(limit=7), 3)
    assert (tokens, verdict) == ([1, 2], [2, 1, 1])
    assert not state.live[0]


def test_nonsense_after_a_right_guess_ends_a_sequence_there() -> None:
    assert kept(batch(), 3, nonsense=1)[:2] == ([1], [3, 0, 0])
    assert kept(batch(), 3, nonsense=3)[:2] == ([1, 2, 7], [0, 3, 2])

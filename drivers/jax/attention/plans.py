"""What attention is asked for: which tokens are new, where their keys and values go, how keys are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DecodePlan(NamedTuple):
    """One new token for each of B rows.

    ``tables`` [B, width] are page ids, ``lengths`` [B] count the tokens including the new one; the new
    token goes to ``pages`` [B] at ``offsets`` [B], and is dropped where the page is out of range.
    """

    tables: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class PrefillPlan(NamedTuple):
    """C consecutive tokens for each of R rows, from position ``starts`` [R] on.

    ``tables`` [R, width]; ``lengths`` [R] count a row's tokens up to its last new one; ``pages`` and
    ``offsets`` [R, C] say where each goes, and padding is dropped because its page is out of range.
    """

    tables: jax.Array
    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class VerifyPlan(NamedTuple):
    """The last token of each of B rows and C - 1 guessed ones, from position ``starts`` [B] on.

    As in ``PrefillPlan``; C is small, B may be large, and a row whose ``lengths`` is 0 reads nothing.
    """

    tables: jax.Array
    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class MixedPlan(NamedTuple):
    """One new token for each of B rows, and then R pieces of prompts, of C tokens each, all in one row."""

    rows: DecodePlan
    pieces: VerifyPlan

    @property
    def pages(self) -> jax.Array:
        """Where the tokens go, [B + R * C]; their ``offsets`` likewise."""
        return jnp.concatenate([self.rows.pages, self.pieces.pages.reshape(-1)])

    @property
    def offsets(self) -> jax.Array:
        return jnp.concatenate([self.rows.offsets, self.pieces.offsets.reshape(-1)])

    def part(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B + R * C, ...] -> [B, ...] and [R, C, ...]."""
        rows = len(self.rows.pages)
        return x[:rows], x[rows:].reshape(*self.pieces.pages.shape, *x.shape[1:])


def joined(own: jax.Array, others: jax.Array) -> jax.Array:
    """What ``MixedPlan.part`` makes two of."""
    return jnp.concatenate([own, others.reshape(-1, *own.shape[1:])])


@dataclass(frozen=True)
class Scoring:
    """How a layer scores keys: with ``window``, only by the last so many tokens (itself included).

    Scores are multiplied by ``scale`` (0: head_dim ** -0.5), then softly capped at ``cap`` (0: not at all).
    """

    window: int = 0
    cap: float = 0.0
    scale: float = 0.0


PLAIN = Scoring()

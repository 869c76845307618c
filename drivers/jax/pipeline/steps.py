"""The programs of pipeline stages where they differ from those of a whole model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention.plans import DecodePlan
from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution.state import BatchState

PLANNED = 4
"""Columns of a packed plan before the block table."""


def enter(
    shape: Shape, weights: Any, caches: list[Any], state: BatchState, rows: jax.Array
) -> tuple[list[Any], jax.Array, jax.Array]:
    """Decode the slots ``rows`` [B] on the first stage.

    Returns the caches, activations [B, hidden], and the plan for the other stages, int32 [B, 4 + width].
    """
    position, plan = forward.decode_plan(shape, state, rows)
    caches, x = forward.run(shape, weights, caches, state.token[rows], position, plan)
    columns = jnp.stack([position, plan.lengths, plan.pages, plan.offsets], axis=1)
    return caches, x, jnp.concatenate([columns, plan.tables], axis=1)


def proceed(
    shape: Shape, weights: Any, caches: list[Any], x: jax.Array, packed: jax.Array
) -> tuple[list[Any], jax.Array]:
    """Decode on a later stage; returns the caches, and activations or, of the last stage, logits."""
    position, lengths, pages, offsets = (packed[:, column] for column in range(PLANNED))
    plan = DecodePlan(tables=packed[:, PLANNED:], lengths=lengths, pages=pages, offsets=offsets)
    return forward.run(shape, weights, caches, x, position, plan)


def absorb(state: BatchState, rows: jax.Array, packed: jax.Array) -> BatchState:
    """Enter what the last stage sampled for the slots ``rows`` [B], packed [2, B] by ``sampling.sample``."""
    token, reason = packed
    made = token >= 0
    return state._replace(
        token=state.token.at[rows].set(jnp.where(made, token, state.token[rows])),
        length=state.length.at[rows].add(made.astype(jnp.int32)),
        live=state.live.at[rows].set(state.live[rows] & (reason == 0)),
    )

"""The steps of a decoder over the paged cache: one token for many rows, many tokens for few rows, both of
these at once, and the few tokens that are to be verified.

Layers are unrolled (a scan copies each layer's weights on the CPU and costs 1.5 to 5 times as much), but
one layer is traced only once: the inner jit makes it a function that the lowered program calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.adapters import lora
from llmos.drivers.jax.attention import shared
from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.attention.plans import DecodePlan, MixedPlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.rope import Turn
from llmos.drivers.jax.execution.state import BatchState
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sharding.collectives import Columns

Plan = DecodePlan | PrefillPlan | VerifyPlan | MixedPlan


@dataclass(frozen=True)
class Shape:
    """What a forward program is specialised on besides its bucket.

    Weights are passed as a flat list: ``graph`` and ``tree`` make the decoder of it while tracing, since
    flattening nnx variables in Python at every call would cost a millisecond. ``vocabulary`` says how logits
    are cut over devices. ``native`` lets products use the CPU's own kernels. With ``adapters`` every row has
    the number of one, or 0; without, the program is that of a model that has no room for any.
    """

    graph: Any
    tree: Any
    backend: AttentionBackend
    page_tokens: int
    pages: int
    vocabulary: Columns
    native: bool = False
    adapters: bool = False


def heading(adapters: bool) -> int:
    """Columns of a chunk before the block table."""
    return 3 if adapters else 2


def decode(
    shape: Shape, weights: Any, caches: list[Any], state: BatchState, rows: jax.Array
) -> tuple[list[Any], jax.Array]:
    """Feed the last token of the slots ``rows`` [B]; returns the caches and float32 logits [B, vocab].

    Where the vocabulary is cut over devices, logits are each device's part, here as below.
    """
    adapter = _adapters(shape, state, rows)
    return run(shape, weights, caches, state.token[rows], *decode_plan(shape, state, rows), adapter=adapter)


def decode_plan(shape: Shape, state: BatchState, rows: jax.Array) -> tuple[jax.Array, DecodePlan]:
    """Positions [B] of the last tokens of the slots ``rows`` [B], and where their KV goes."""
    live = state.live[rows]
    position = jnp.maximum(state.length[rows] - 1, 0)
    tables = state.tables[rows]
    column = position // shape.page_tokens
    page = jnp.take_along_axis(tables, column[:, None], axis=1)[:, 0]
    return position, DecodePlan(
        tables=tables,
        lengths=jnp.where(live, position + 1, 0),
        pages=jnp.where(live, page, shape.pages),
        offsets=position % shape.page_tokens,
    )


def prefill(
    shape: Shape,
    fresh: bool,
    width: int,
    weights: Any,
    caches: list[Any],
    chunk: jax.Array,
    x: jax.Array | None = None,
) -> tuple[list[Any], jax.Array]:
    """Feed prompt tokens to R sequences; nothing of the batch is read, so a prompt need not be in it yet.

    ``chunk`` [R, heading + width + C] holds for each row the position of its first token, how many tokens
    count, its adapter if there are any, its block table and the C tokens. With ``fresh`` all rows start at
    position 0, and attend to nothing that is in the cache. ``x`` [R, C, hidden] is what the pipeline stage
    before made of them, if there is one.

    Returns the caches and the float32 logits [R, vocab] after each row's last new token.
    """
    table = heading(shape.adapters)
    head, tables, tokens = jnp.split(chunk, [table, table + width], axis=1)
    starts, counts = head[:, 0], head[:, 1]
    adapter = head[:, 2] if shape.adapters else None
    position, plan = _plan(shape, tables, starts, counts, tokens.shape[1])
    last = jnp.maximum(counts - 1, 0)
    return run(shape, weights, caches, tokens if x is None else x, position, plan, last, fresh, adapter)


def mixed(
    shape: Shape,
    width: int,
    weights: Any,
    caches: list[Any],
    state: BatchState,
    rows: jax.Array,
    chunk: jax.Array,
) -> tuple[list[Any], jax.Array, jax.Array]:
    """Feed the last token of the slots ``rows`` [B] and pieces of prompts in one pass, so that weights are
    read once. ``chunk`` is as for ``prefill``; a prompt may have several of its rows, in order.

    Returns the caches and the float32 logits [B, vocab] and [R, vocab], after each piece's last token.
    """
    position, decoding = decode_plan(shape, state, rows)
    table = heading(adapters=False)
    head, tables, tokens = jnp.split(chunk, [table, table + width], axis=1)
    starts, counts = head[:, 0], head[:, 1]
    behind, plan = _plan(shape, tables, starts, counts, tokens.shape[1])
    plan = plan._replace(lengths=jnp.where(counts > 0, plan.lengths, 0))
    fed = jnp.concatenate([state.token[rows], tokens.reshape(-1)])
    first = len(rows) + jnp.arange(len(chunk)) * tokens.shape[1]
    last = jnp.concatenate([jnp.arange(len(rows)), first + jnp.maximum(counts - 1, 0)])
    both = MixedPlan(decoding, VerifyPlan(*plan))
    position = jnp.concatenate([position, behind.reshape(-1)])
    caches, logits = run(shape, weights, caches, fed, position, both, last)
    return caches, logits[: len(rows)], logits[len(rows) :]


def verify(
    shape: Shape,
    weights: Any,
    caches: list[Any],
    state: BatchState,
    rows: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> tuple[list[Any], jax.Array]:
    """Feed the slots ``rows`` [B] their last token and what is guessed to follow: ``tokens`` [B, C].

    ``counts`` [B] of each row's tokens count, and only their KV is written.

    Returns the caches and float32 logits [B, C, vocab].
    """
    starts = jnp.maximum(state.length[rows] - 1, 0)
    position, plan = _plan(shape, state.tables[rows], starts, counts, tokens.shape[1])
    # A row of which nothing counts must not be taken for the longest.
    plan = plan._replace(lengths=jnp.where(counts > 0, plan.lengths, 0))
    adapter = _adapters(shape, state, rows)
    return run(shape, weights, caches, tokens, position, VerifyPlan(*plan), adapter=adapter)


def _adapters(shape: Shape, state: BatchState, rows: jax.Array) -> jax.Array | None:
    return state.adapter[rows] if shape.adapters and state.adapter is not None else None


def _plan(
    shape: Shape, tables: jax.Array, starts: jax.Array, counts: jax.Array, width: int
) -> tuple[jax.Array, PrefillPlan]:
    """Positions [R, width] of consecutive tokens, and where the first ``counts`` [R] of each row go."""
    offset = jnp.arange(width)
    position = starts[:, None] + offset
    column = jnp.minimum(position // shape.page_tokens, tables.shape[1] - 1)
    page = jnp.take_along_axis(tables, column, axis=1)
    return position, PrefillPlan(
        tables=tables,
        starts=starts,
        lengths=starts + counts,
        pages=jnp.where(offset < counts[:, None], page, shape.pages),
        offsets=position % shape.page_tokens,
    )


def run(
    shape: Shape,
    weights: Any,
    caches: list[Any],
    fed: jax.Array,
    position: jax.Array,
    plan: Plan,
    last: jax.Array | None = None,
    fresh: bool = False,
    adapter: jax.Array | None = None,
) -> tuple[list[Any], jax.Array]:
    """Feed token ids, or the activations of the pipeline stage before, at their positions.

    The last layer goes on behind its attention with the tokens ``last`` alone: of the others only keys and
    values are needed.

    Returns the caches and float32 logits, of the tokens ``last`` [R] of each row (or of all, if all are one
    row) where it is given; or, of a stage that is not the last, the activations of all.
    """
    model = nnx.merge(shape.graph, jax.tree.unflatten(shape.tree, weights))
    turns = model.turns(position)
    x = model.embed(fed, position) if model.first else fed
    for number, layer in enumerate(model.layers):
        graph, own = nnx.split(layer)
        cache = shared.layer(caches, number)
        picked = last if model.last and number == len(model.layers) - 1 else None
        static, turn = (graph, shape.backend, fresh, shape.native), turns[layer.rope]
        x, cache = _layer(*static, own, cache, x, turn, plan, adapter, picked)
        caches = shared.with_layer(caches, number, cache)
    if not model.last:
        return caches, x
    with kernels.use(shape.native):
        return caches, model.logits(x)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(
    graph: Any,
    backend: AttentionBackend,
    fresh: bool,
    native: bool,
    weights: Any,
    cache: Any,
    x: jax.Array,
    turn: Turn,
    plan: Plan,
    adapter: jax.Array | None,
    last: jax.Array | None,
) -> tuple[jax.Array, Any]:
    def attend(new: Projected, scoring: Scoring) -> tuple[jax.Array, Any]:
        if isinstance(plan, DecodePlan):
            return backend.step(plan, cache, new, scoring)
        if isinstance(plan, MixedPlan):
            return backend.mixed(plan, cache, *new.parts(), scoring)
        return backend.extend(plan, cache, new, fresh, scoring)

    def pick(x: jax.Array) -> jax.Array:
        if last is None:
            return x
        return x[last] if x.ndim == 2 else jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]

    with kernels.use(native), lora.serving(adapter):
        x, cache = nnx.merge(graph, weights)(x, turn, attend, pick)
    return x, cache

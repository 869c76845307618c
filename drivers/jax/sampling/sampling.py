"""Choosing the next tokens on the device, and deciding there which sequences finish.

Randomness is counter-based: the noise for a token depends only on its sequence's seed and its position,
so a sequence that was displaced and started again continues as it would have. The variants differ in
cost: "greedy" is an argmax, "plain" adds temperature and min-p, "filtered" adds top-k and top-p, and
"full" adds logit bias and penalties, which need token counts. The host picks the cheapest that serves
every row.

Where a model's vocabulary is cut over devices each chooses among its own logits, and the best of all is
taken; only the last two variants gather them.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from llmos.drivers.jax.execution.state import BatchState, Choice, Tallies
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sampling.noise import noise
from llmos.drivers.jax.sampling.truncation import kept
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.sdk.messages import FinishReason, Sampling

Variant = Literal["greedy", "plain", "filtered", "full"]
VARIANTS: tuple[Variant, ...] = ("greedy", "plain", "filtered", "full")
RUN = 128
"""Numbers of a row that are looked through for the place of its maximum; it divides many vocabularies."""
REASONS: dict[int, FinishReason] = {1: "stop", 2: "length", 3: "error"}


def variant_of(sampling: Sampling) -> Variant:
    """The cheapest variant that serves these parameters."""
    penalised = sampling.repetition_penalty != 1.0 or sampling.logit_bias
    if penalised or sampling.presence_penalty or sampling.frequency_penalty:
        return "full"
    if sampling.temperature <= 0.0:
        return "greedy"
    return "filtered" if sampling.top_k > 0 or sampling.top_p < 1.0 else "plain"


def sample(
    variant: Variant,
    columns: Columns,
    logits: jax.Array,
    rows: jax.Array,
    state: BatchState,
    tallies: Tallies | None,
) -> tuple[BatchState, Tallies | None, jax.Array]:
    """Choose a token for each of the slots ``rows`` [B] from float32 ``logits`` [B, vocab].

    ``columns`` says how these are cut over devices.

    Returns the state with those tokens appended, and int32 [2, B]: the token, or -1 where the row was
    not live or its logits are not finite; and how the sequence finished (0 not, else ``REASONS``).
    """
    choice = Choice(*(field[rows] for field in state.choice))
    live, position = state.live[rows], state.length[rows]
    counted = Tallies(*(field[rows] for field in tallies)) if tallies is not None else None
    token = choose(variant, logits, choice, position, columns, counted)
    sound = token >= 0
    made = live & sound
    length = position + made
    stopped = jnp.any(state.stop[rows] == token[:, None], axis=-1)
    reason = jnp.where(stopped, 1, jnp.where(length >= state.limit[rows], 2, 0))
    reason = jnp.where(live, jnp.where(sound, reason, 3), 0)
    state = state._replace(
        token=state.token.at[rows].set(jnp.where(made, token, state.token[rows])),
        length=state.length.at[rows].set(length),
        live=state.live.at[rows].set(live & (reason == 0)),
    )
    if variant == "full" and tallies is not None:
        tallies = tallies._replace(output=tallies.output.at[rows, token].add(made.astype(jnp.int32)))
    return state, tallies, jnp.stack([jnp.where(made, token, -1), reason]).astype(jnp.int32)


def adjust(logits: jax.Array, choice: Choice, tallies: Tallies) -> jax.Array:
    """Logit bias, then repetition penalty (Keskar et al., 2019), then presence and frequency penalty."""
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, tallies.bias_ids].add(tallies.bias, mode="drop")
    penalty = choice.repetition_penalty[:, None]
    seen = tallies.prompt | (tallies.output > 0)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    given = tallies.output.astype(jnp.float32)
    presence = choice.presence_penalty[:, None] * jnp.minimum(given, 1.0)
    return jnp.asarray(logits - presence - choice.frequency_penalty[:, None] * given)


def choose(
    variant: Variant,
    logits: jax.Array,
    choice: Choice,
    position: jax.Array,
    columns: Columns,
    tallies: Tallies | None = None,
) -> jax.Array:
    """The tokens [B] at ``position`` [B], or -1 where ``logits`` [B, vocab] are not sound: the largest is not
    finite, or one is no number. ``columns`` says how they are cut over devices; "full" needs ``tallies``.

    A function of logits, seed, position and parameters, and of nothing else. By a native kernel where there
    is one, whose sums and logarithms may differ in their last bits.
    """
    if variant in ("filtered", "full"):
        logits, columns = columns.whole(logits), Columns(columns.size)
    if tallies is not None:
        logits = adjust(logits, choice, tallies)
    if kernels.chooses(logits):
        if variant == "greedy":
            choice = choice._replace(temperature=jnp.zeros_like(choice.temperature))
        return kernels.choose(logits, choice, position, cuts=variant in ("filtered", "full"))
    logits = columns.real(logits)
    top, greedy = columns.largest(logits, _top(logits), largest(logits))
    token = greedy if variant == "greedy" else _drawn(variant, logits, top, greedy, choice, position, columns)
    return jnp.where(jnp.isfinite(top), token, -1)


def _top(logits: jax.Array) -> jax.Array:
    """The largest of each row, or what is no number: XLA:CPU's maximum of a long row misses one."""
    top = jnp.max(logits, axis=-1)
    if jax.default_backend() != "cpu":
        return top
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), jnp.nan, top)


def _drawn(
    variant: Variant,
    logits: jax.Array,
    top: jax.Array,
    greedy: jax.Array,
    choice: Choice,
    position: jax.Array,
    columns: Columns,
) -> jax.Array:
    """Tokens by temperature; ``greedy`` [B], the places of ``top`` [B], where that is 0."""
    cold = choice.temperature <= 0.0
    temperature = jnp.where(cold, 1.0, choice.temperature)
    heated = logits / temperature[:, None]
    if variant in ("filtered", "full"):
        heated = kept(heated, choice.top_k, choice.top_p)
    likely = keep_likely(heated, top / temperature, choice)
    noisy = likely + noise(choice.seed, position, logits.shape[-1], columns.first(logits))
    _, drawn = columns.largest(noisy, jnp.max(noisy, axis=-1), largest(noisy))
    return jnp.where(cold, greedy, drawn)


def largest(x: jax.Array) -> jax.Array:
    """Where the largest number of each row [B, n] is, int32 [B]: the first of equals, or one that is none.

    XLA:CPU finds a maximum with whole vectors and its place number by number, so there the place is sought in
    a run of numbers that holds the maximum.
    """
    if jax.default_backend() != "cpu" or x.shape[-1] % RUN:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    runs = x.reshape(x.shape[0], -1, RUN)
    run = jnp.argmax(jnp.max(runs, axis=-1), axis=-1)
    found = jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0]
    return (run * RUN + jnp.argmax(found, axis=-1)).astype(jnp.int32)


def keep_likely(logits: jax.Array, top: jax.Array, choice: Choice) -> jax.Array:
    """min-p (Nguyen et al., 2024): drop what is less likely than ``min_p`` times the likeliest, ``top``."""
    floor = top + jnp.log(choice.min_p)
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)

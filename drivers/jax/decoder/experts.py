"""Mixtures of experts: a router sends each token to a few of many gated MLPs.

The products are grouped by device and by how many tokens there are. On accelerators few tokens gather the
weights of their own experts, and many are sorted by expert for a ragged product. XLA:CPU copies gathered
weights slowly and multiplies a ragged product out in full; there a loop over the assignments of few tokens,
or over all experts with all tokens, was several times faster.

Quantised experts keep float activations: their weights are converted as they are read, except in the ragged
product, for which all are converted first.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.layers import ACTIVATIONS, Init, Linear, precision, product
from llmos.drivers.jax.sharding.collectives import WHOLE, total

Grouping = Literal["gather", "ragged", "singly", "turns"]
Weight = tuple[jax.Array, jax.Array | None]
"""Values [experts, out, in] and, if they are quantised, their scales [experts, out]."""
_NAMES = ("gate", "up", "down")


class Experts(nnx.Module):  # type: ignore[misc]
    """Router and experts of one layer: ``gate`` and ``up`` are [experts, inner, hidden], ``down`` turned.

    If they are quantised, each has its scale [experts, out]: ``gate_scale`` and so on.

    Over a mesh every device has all tokens and some of the experts, or a slice of each: it computes what
    its own give to each token, and the sum is taken once, as in a dense layer cut the same way.
    """

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        count, inner, hidden = config.experts, config.expert_intermediate, config.hidden
        self.activation, self.active = config.activation, config.active_experts
        self.normalise, self.split = config.normalise_experts, WHOLE
        self.router = Linear(count, hidden, init)
        self.gate = nnx.Param(init((count, inner, hidden)))
        self.up = nnx.Param(init((count, inner, hidden)))
        self.down = nnx.Param(init((count, hidden, inner)))
        self.quantised = False

    def quantise(self, dtype: Any) -> None:
        """Replace the experts' weights, not the router's, by 8-bit values and their scales."""
        for name in _NAMES:
            weight, scale = quant.quantised(getattr(self, name).get_value(), dtype)
            setattr(self, name, nnx.Param(weight))
            setattr(self, f"{name}_scale", nnx.Param(scale))
        self.quantised = True

    def weights(self) -> list[Weight]:
        """Gate, up and down."""
        values = [getattr(self, name)[...] for name in _NAMES]
        scales = [getattr(self, f"{name}_scale")[...] if self.quantised else None for name in _NAMES]
        return list(zip(values, scales))

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = route(self.router(rows), self.active, self.normalise)
        shares, chosen = self._own(shares, chosen)
        grouping = choose(rows.shape[0] * self.active, self.gate.shape[0], jax.default_backend())
        ways = {"gather": self.gathered, "ragged": self.ragged, "singly": self.singly, "turns": self.turns}
        run = ways[grouping]
        own = run(rows, shares.astype(x.dtype), chosen)
        return total(own, self.split.wide).reshape(x.shape)

    def _own(self, shares: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids among this device's experts; a choice that is elsewhere has no share, and an id past them."""
        if not self.split.expert:
            return shares, chosen
        count = self.gate.shape[0]
        own = chosen - jax.lax.axis_index(self.split.expert) * count
        held = (own >= 0) & (own < count)
        return jnp.where(held, shares, 0), jnp.where(held, own, count)

    def gathered(self, rows: jax.Array, shares: jax.Array, chosen: jax.Array) -> jax.Array:
        """Each assignment multiplies with its own copy of its expert's weights."""
        gate, up, down = (_pick(part, chosen) for part in self.weights())
        inner = ACTIVATIONS[self.activation](_each("th,tafh->taf", rows, gate)) * _each(
            "th,tafh->taf", rows, up
        )
        return _each("taf,tahf->tah", inner * shares[..., None], down).sum(axis=1)

    def ragged(self, rows: jax.Array, shares: jax.Array, chosen: jax.Array) -> jax.Array:
        """Assignments sorted by expert; each expert multiplies with its own run of rows."""
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        source = order // self.active
        sizes = jnp.bincount(chosen.reshape(-1), length=self.gate.shape[0]).astype(jnp.int32)
        sorted_rows = rows[source]
        experts = chosen.reshape(-1)[order]
        parts = self.weights()
        gate, up = (_ragged(sorted_rows, part, sizes, experts) for part in parts[:2])
        out = _ragged(ACTIVATIONS[self.activation](gate) * up, parts[2], sizes, experts)
        return jnp.zeros_like(rows).at[source].add(out * shares.reshape(-1)[order][:, None])

    def singly(self, rows: jax.Array, shares: jax.Array, chosen: jax.Array) -> jax.Array:
        """One assignment after another, each with its expert alone."""
        flat, parts = chosen.reshape(-1), self.weights()

        def one(index: jax.Array, total: jax.Array) -> jax.Array:
            gate, up, down = (_pick(part, flat[index]) for part in parts)
            row = rows[index // self.active][None]
            inner = ACTIVATIONS[self.activation](_product(row, gate)) * _product(row, up)
            moved = _product(inner * shares.reshape(-1)[index], down)
            return total.at[index // self.active].add(moved[0])

        result: jax.Array = jax.lax.fori_loop(0, flat.shape[0], one, jnp.zeros_like(rows))
        return result

    def turns(self, rows: jax.Array, shares: jax.Array, chosen: jax.Array) -> jax.Array:
        """Every expert takes all rows in its turn, weighted by 0 where it was not chosen."""
        count = self.gate.shape[0]
        weight = jnp.zeros((rows.shape[0], count), rows.dtype)
        weight = weight.at[jnp.arange(rows.shape[0])[:, None], chosen].add(shares)
        parts = self.weights()

        def turn(index: jax.Array, total: jax.Array) -> jax.Array:
            gate, up, down = (_pick(part, index) for part in parts)
            inner = ACTIVATIONS[self.activation](_product(rows, gate)) * _product(rows, up)
            return total + _product(inner * weight[:, index, None], down)

        result: jax.Array = jax.lax.fori_loop(0, count, turn, jnp.zeros_like(rows))
        return result


def route(logits: jax.Array, active: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Shares (float32) and ids of the ``active`` likeliest experts [tokens, active] by logits [tokens, n]."""
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), active)
    return (shares / shares.sum(axis=-1, keepdims=True) if normalise else shares), chosen


def choose(assignments: int, experts: int, platform: str) -> Grouping:
    """How to group products: assignments go alone while they touch fewer weights than there are."""
    few = 2 * assignments <= experts
    if platform == "cpu":
        return "singly" if few else "turns"
    return "gather" if few else "ragged"


def _pick(weight: Weight, index: jax.Array) -> Weight:
    """The weights of the experts ``index``, with its axes before theirs."""
    values, scale = weight
    return values[index], None if scale is None else scale[index]


def _product(rows: jax.Array, weight: Weight) -> jax.Array:
    """Rows [n, in] times the weight of one expert."""
    return product(rows, weight[0], scale=weight[1])


def _scaled(result: jax.Array, scale: jax.Array | None) -> jax.Array:
    return result if scale is None else (result.astype(jnp.float32) * scale).astype(result.dtype)


def _each(form: str, x: jax.Array, weight: Weight) -> jax.Array:
    """The products of an einsum over the assignments [tokens, active], whose experts ``weight`` has."""
    values, scale = weight
    exact, wide = precision(x), values.astype(x.dtype)
    return _scaled(jnp.einsum(form, x, wide, precision=exact, preferred_element_type=x.dtype), scale)


def _ragged(rows: jax.Array, weight: Weight, sizes: jax.Array, experts: jax.Array) -> jax.Array:
    """Rows [n, in], sorted by their ``experts`` [n], times the weight of each -> [n, out]."""
    values, scale = weight
    turned = values.swapaxes(1, 2).astype(rows.dtype)
    result = jax.lax.ragged_dot(
        rows, turned, sizes, precision=precision(rows), preferred_element_type=rows.dtype
    )
    return _scaled(result, None if scale is None else scale[experts])

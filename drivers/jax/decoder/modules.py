"""The decoder as flax nnx modules: they hold the parameters and compute one layer at a time.

What families differ in is decided by the configuration when a module is made, never while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos.drivers.jax.attention.plans import Scoring
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.experts import Experts
from llmos.drivers.jax.decoder.layers import ACTIVATIONS, Init, Linear, gated, make_norm, product
from llmos.drivers.jax.decoder.rope import Turn, rotation, tables
from llmos.drivers.jax.sharding.collectives import WHOLE, find_rows

Pick = Callable[[jax.Array], jax.Array]
"""Takes from the activations [..., hidden] of all tokens those that anybody will look at."""


def everyone(x: jax.Array) -> jax.Array:
    """Picks all."""
    return x


class Attend(Protocol):
    """Attention of one layer over its cache."""

    def __call__(self, new: Projected, scoring: Scoring) -> tuple[jax.Array, Any]:
        """Output [..., heads, head_dim] of the new tokens, and the layer's cache with them."""
        ...


def struct(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    """The shape, dtype and placement of an array without its values."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def abstract(dtype: Any) -> Init:
    """Parameters without values."""
    return lambda shape: struct(shape, dtype)


def random(dtype: Any, seed: int) -> Init:
    """Random parameters scaled to keep activations near one, for tests and measurements."""
    keys = nnx.Rngs(seed)

    def make(shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jnp.asarray(jax.random.normal(keys.params(), shape, dtype) * shape[-1] ** -0.5)

    return make


class Attention(nnx.Module):  # type: ignore[misc]
    """Grouped-query attention with one fused product for queries, keys and values."""

    def __init__(self, config: DecoderConfig, layer: int, init: Init) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        fused = config.query_size + 2 * config.kv_size
        self.qkv = Linear(fused, config.hidden, init, config.qkv_bias)
        self.out = Linear(config.hidden, config.query_size, init, config.out_bias)
        self.scoring = Scoring(config.window(layer), config.attention_cap, config.attention_scale)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim, init)
            self.k_norm = make_norm(config, config.head_dim, init)

    def __call__(
        self, x: jax.Array, turn: Turn, attend: Attend, pick: Pick = everyone
    ) -> tuple[jax.Array, Any]:
        fused = self.qkv(x).reshape(*x.shape[:-1], self.heads + 2 * self.kv_heads, self.head_dim)
        norms = (self.q_norm, self.k_norm) if self.qk_norm else None
        mixed, cache = attend(Projected(fused, turn, self.kv_heads, norms), self.scoring)
        return self.out(pick(mixed.reshape(*x.shape[:-1], self.heads * self.head_dim))), cache


class MLP(nnx.Module):  # type: ignore[misc]
    """Two layers, the first gated (GLU; Shazeer, 2020) by a fused product unless the model has no gates."""

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.activation, self.gated = config.activation, config.gated
        if config.gated:
            self.gate_up = Linear(2 * config.intermediate, config.hidden, init, config.mlp_bias)
        else:
            self.up = Linear(config.intermediate, config.hidden, init, config.mlp_bias)
        self.down = Linear(config.hidden, config.intermediate, init, config.mlp_bias)

    def products(self) -> tuple[Linear, Linear]:
        """Both products, in order."""
        return (self.gate_up if self.gated else self.up), self.down

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.gated:
            return self.down(ACTIVATIONS[self.activation](self.up(x)))
        return self.down(gated(self.activation, self.gate_up(x)))


class Block(nnx.Module):  # type: ignore[misc]
    """One pre-norm decoder layer; ``rope`` says which of the model's rotary tables it uses."""

    def __init__(self, config: DecoderConfig, layer: int, init: Init) -> None:
        self.rope = 1 if config.local_theta and config.window(layer) else 0
        self.post_norms = config.post_norms
        self.attention_norm = make_norm(config, config.hidden, init)
        self.attention = Attention(config, layer, init)
        self.mlp_norm = make_norm(config, config.hidden, init)
        self.mlp = Experts(config, init) if config.sparse(layer) else MLP(config, init)
        if config.post_norms:
            self.attention_post_norm = make_norm(config, config.hidden, init)
            self.mlp_post_norm = make_norm(config, config.hidden, init)

    def __call__(
        self, x: jax.Array, turn: Turn, attend: Attend, pick: Pick = everyone
    ) -> tuple[jax.Array, Any]:
        """All keys and values go to the cache; what follows is computed for what ``pick`` takes."""
        mixed, cache = self.attention(self.attention_norm(x), turn, attend, pick)
        x = pick(x) + (self.attention_post_norm(mixed) if self.post_norms else mixed)
        moved = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(moved) if self.post_norms else moved), cache


class Decoder(nnx.Module):  # type: ignore[misc]
    """Embedding, layers, final norm and output head; the steps in ``forward`` string them together.

    ``first`` and ``last`` say whether it begins with the embedding and ends with the head: a whole one does,
    and a pipeline stage may not.
    """

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.embedding = nnx.Param(init((config.vocab_size, config.hidden)))
        self.split = WHOLE
        self.first = self.last = True
        self.learned = config.learned_positions
        if config.learned_positions:
            self.positions = nnx.Param(init((config.max_positions, config.hidden)))
        self.layers = nnx.List([Block(config, index, init) for index in range(config.layers)])
        self.norm = make_norm(config, config.hidden, init)
        if not config.tied:
            self.head = Linear(config.vocab_size, config.hidden, init)
        self.tied, self.scale, self.cap = config.tied, config.embedding_scale, config.logit_cap
        self.tables, self.turn_scale = tables(config), config.rope_scale

    def quantise(self, dtype: Any) -> None:
        """Quantise the weights of all layers; embedding, head, norms and routers stay as they are.

        The head makes the logits: on SmolLM2 an int8 head beside int8 layers doubled the tokens that changed.
        """
        for layer in self.layers:
            products = (layer.attention.qkv, layer.attention.out)
            inner = (layer.mlp,) if isinstance(layer.mlp, Experts) else layer.mlp.products()
            for part in (*products, *inner):
                part.quantise(dtype)

    def embed(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """Token ids and their positions [...] -> activations [..., hidden]."""
        found = find_rows(self.embedding[...], tokens, self.split.wide)
        if self.scale != 1.0:
            found = found * jnp.asarray(self.scale, found.dtype)
        return found + self.positions[...][position] if self.learned else found

    def turns(self, position: jax.Array) -> list[Turn]:
        """Cosines and sines of the positions by each of the model's rotary tables."""
        arrays = [np.asarray(table, np.float32) for table in self.tables]
        return [rotation(position, array, self.turn_scale) for array in arrays]

    def logits(self, x: jax.Array) -> jax.Array:
        """Activations [..., hidden] -> float32 logits [..., vocab_size], or this device's part of them."""
        weight = self.embedding[...] if self.tied else self.head.weight[...]
        raw = product(self.norm(x), weight, jnp.float32)
        return jnp.tanh(raw / self.cap) * self.cap if self.cap else raw

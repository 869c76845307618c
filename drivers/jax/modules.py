"""The decoder as flax nnx modules: they hold the parameters and compute one layer at a time.

All products contract a weight's last axis ([out, in], as checkpoints store it), so that nothing is
transposed at load. Activations are [..., hidden] with any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.rope import rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q [..., heads, head_dim], k and v [..., kv_heads, head_dim]) -> (output like q, new layer cache)."""


Init = Callable[[tuple[int, ...]], Any]
"""Makes a parameter of a shape: an array, or only its ``jax.ShapeDtypeStruct``."""


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


def product(x: jax.Array, weight: jax.Array, out: Any = None) -> jax.Array:
    """``x`` [..., in] times ``weight`` [out, in] -> [..., out], accumulated in float32.

    A single bfloat16 row is doubled on the CPU: XLA:CPU converts the whole matrix for one row.
    """
    rows = x.reshape(-1, x.shape[-1])
    lonely = rows.shape[0] == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    if lonely:
        rows = jnp.concatenate([rows, rows])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    result = jax.lax.dot_general(
        rows, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=out or x.dtype
    )
    return (result[:1] if lonely else result).reshape(*x.shape[:-1], weight.shape[0])


class RMSNorm(nnx.Module):  # type: ignore[misc]
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float, init: Init) -> None:
        self.eps = eps
        self.scale = nnx.Param(init((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scaled: jax.Array = normed.astype(x.dtype) * self.scale[...]
        return scaled


class Linear(nnx.Module):  # type: ignore[misc]
    """A product without bias; ``weight`` is [out, in]."""

    def __init__(self, out: int, inner: int, init: Init) -> None:
        self.weight = nnx.Param(init((out, inner)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(x, self.weight[...])


class Attention(nnx.Module):  # type: ignore[misc]
    """Grouped-query attention with one fused product for queries, keys and values."""

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = Linear(config.query_size + 2 * config.kv_size, config.hidden, init)
        self.out = Linear(config.hidden, config.query_size, init)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        heads = self.qkv(x).reshape(*x.shape[:-1], self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = jnp.split(heads, [self.heads, self.heads + self.kv_heads], axis=-2)
        mixed, cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(mixed.reshape(*x.shape[:-1], self.heads * self.head_dim)), cache


class GatedMLP(nnx.Module):  # type: ignore[misc]
    """SwiGLU (Shazeer, 2020) with one fused product for gate and up."""

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.gate_up = Linear(2 * config.intermediate, config.hidden, init)
        self.down = Linear(config.hidden, config.intermediate, init)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):  # type: ignore[misc]
    """One pre-norm decoder layer."""

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, init)
        self.attention = Attention(config, init)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps, init)
        self.mlp = GatedMLP(config, init)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        mixed, cache = self.attention(self.attention_norm(x), cos, sin, attend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):  # type: ignore[misc]
    """Embedding, layers, final norm and output head; the steps in ``forward`` string them together."""

    def __init__(self, config: DecoderConfig, init: Init) -> None:
        self.embedding = nnx.Param(init((config.vocab_size, config.hidden)))
        self.layers = nnx.List([Block(config, init) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden, config.norm_eps, init)
        if not config.tied:
            self.head = Linear(config.vocab_size, config.hidden, init)
        self.tied = config.tied

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids [...] -> activations [..., hidden]."""
        found: jax.Array = self.embedding[...][tokens]
        return found

    def logits(self, x: jax.Array) -> jax.Array:
        """Activations [..., hidden] -> float32 logits [..., vocab_size]."""
        weight = self.embedding[...] if self.tied else self.head.weight[...]
        return product(self.norm(x), weight, jnp.float32)

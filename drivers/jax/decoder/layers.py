"""What decoders and encoders are made of: products, norms and activations.

All products contract a weight's last axis ([out, in], as checkpoints store it), so that nothing is
transposed at load. Activations are [..., hidden] with any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.adapters import lora
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.config import Activation, DecoderConfig
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sharding.collectives import total

Init = Callable[[tuple[int, ...]], Any]
"""Makes a parameter of a shape: an array, or only its ``jax.ShapeDtypeStruct``."""


def gelu(x: jax.Array) -> jax.Array:
    """The exact one, in float32: jax's own asks for ``erfc``, which a GPU computes longer than it reads."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def product(x: jax.Array, weight: jax.Array, out: Any = None, scale: jax.Array | None = None) -> jax.Array:
    """``x`` [..., in] times ``weight`` [out, in] -> [..., out], accumulated in float32.

    A quantised weight has a ``scale`` [out]. A single bfloat16 row is doubled on the CPU: XLA:CPU converts
    the whole matrix for one row. A native kernel does it where there is one and it is faster.
    """
    if scale is not None:
        return quant.product(x, weight, scale, out or x.dtype, product)
    rows = x.reshape(-1, x.shape[-1])
    if kernels.suits(rows, weight):
        return kernels.product(rows, weight, out).reshape(*x.shape[:-1], weight.shape[0])
    lonely = rows.shape[0] == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    if lonely:
        rows = jnp.concatenate([rows, rows])
    result = jax.lax.dot_general(
        rows,
        weight,
        (((1,), (1,)), ((), ())),
        precision=precision(x),
        preferred_element_type=out or x.dtype,
    )
    return (result[:1] if lonely else result).reshape(*x.shape[:-1], weight.shape[0])


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """Of a product with ``x``: float32 is not to be cut to a narrower type."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def gated(activation: Activation, both: jax.Array) -> jax.Array:
    """The activated first half of ``both`` [..., 2 n] times the second -> [..., n].

    In float32 on a CPU, which rounds every bfloat16 result and takes twice as long, or by a native kernel.
    """
    rows = both.reshape(-1, both.shape[-1])
    if kernels.gates(rows, activation):
        return kernels.gate(rows, activation).reshape(*both.shape[:-1], -1)
    gate, up = jnp.split(both, 2, axis=-1)
    act = ACTIVATIONS[activation]
    if jax.default_backend() != "cpu":
        return act(gate) * up
    return (act(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


class RMSNorm(nnx.Module):  # type: ignore[misc]
    """Root-mean-square norm, computed in float32; a ``unit`` one stores its scale less 1 (Gemma)."""

    def __init__(self, size: int, eps: float, init: Init, unit: bool = False) -> None:
        self.eps, self.unit = eps, unit
        self.scale = nnx.Param(init((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scaled: jax.Array
        if self.unit:
            scaled = (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        else:
            scaled = normed.astype(x.dtype) * self.scale[...]
        return scaled


class LayerNorm(nnx.Module):  # type: ignore[misc]
    """Layer norm (Ba et al., 2016) with scale and bias, computed in float32."""

    def __init__(self, size: int, eps: float, init: Init) -> None:
        self.eps = eps
        self.scale = nnx.Param(init((size,)))
        self.bias = nnx.Param(init((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scaled: jax.Array = normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return scaled.astype(x.dtype)


def make_norm(config: DecoderConfig, size: int, init: Init) -> RMSNorm | LayerNorm:
    """The norm of a model's kind."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps, init)
    return RMSNorm(size, config.norm_eps, init, unit=config.norm == "rms_unit")


class Linear(nnx.Module):  # type: ignore[misc]
    """A product, and a bias if there is one; ``weight`` is [out, in], its ``scale`` [out] if quantised.

    Where its inputs are cut over axes of a mesh, ``join`` names them: the products are parts of a sum. With
    adapters (see ``lora``) it has ``lora_a`` and ``lora_b``, and ``parts``: what it is fused of.
    """

    def __init__(self, out: int, inner: int, init: Init, bias: bool = False) -> None:
        self.weight = nnx.Param(init((out, inner)))
        self.join: tuple[str, ...] = ()
        self.parts: tuple[int, ...] = ()
        self.biased, self.quantised = bias, False
        if bias:
            self.bias = nnx.Param(init((out,)))

    def quantise(self, dtype: Any) -> None:
        """Replace the weight by 8-bit values and their scale; of a weight without values, the shapes."""
        weight, scale = quant.quantised(self.weight.get_value(), dtype)
        self.weight, self.scale, self.quantised = nnx.Param(weight), nnx.Param(scale), True

    def adapt(self, parts: tuple[int, ...], adapters: int, rank: int, init: Init) -> None:
        """Make room for adapters of its ``parts``, whose sizes add up to its outputs."""
        out, inner = self.weight.get_value().shape
        self.parts = parts
        self.lora_a = nnx.Param(init((adapters, len(parts) * rank, inner)))
        self.lora_b = nnx.Param(init((out, adapters, rank)))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] if self.quantised else None
        result = total(product(x, self.weight[...], scale=scale), self.join)
        if self.biased:
            result = result + self.bias[...]
        if self.parts:
            result = lora.add(result, x, self.lora_a[...], self.lora_b[...], self.parts, product)
        return result

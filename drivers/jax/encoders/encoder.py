"""Encoders as flax nnx modules: embeddings of texts, classification of texts and of pairs (reranking).

Rows of a batch are padded at their ends; padding changes no result. All attention is bidirectional and
dense, on an NVIDIA GPU by cuDNN: encoders take short texts, all tokens at once, and keep nothing between
calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.attention.cudnn import suits_cudnn
from llmos.drivers.jax.decoder.config import Activation
from llmos.drivers.jax.decoder.layers import ACTIVATIONS, Init, LayerNorm, Linear, precision
from llmos.ipc.errors import InvalidArgument

_MASKED = -1e30
_LIMITS = {
    "vocab_size": 1 << 21,
    "hidden": 1 << 14,
    "layers": 1 << 8,
    "heads": 1 << 8,
    "intermediate": 1 << 17,
    "positions": 1 << 20,
    "types": 1 << 8,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder.

    Tokens are at the ``positions`` rows from ``first_position`` on. ``pooling`` makes one vector of a text:
    the mean of its tokens or its first, ``normalise`` d to length one. ``labels`` 0 means no classifier;
    ``exclusive`` says that only one of the labels, called ``names``, can be true. A text has ``longest``
    tokens at most where the model was trained for less than it has positions (0: it was not).
    """

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int
    norm_eps: float
    activation: Activation = "gelu"
    first_position: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True
    labels: int = 0
    names: tuple[str, ...] = ()
    exclusive: bool = True
    longest: int = 0

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 0 < getattr(self, name) <= limit:
                raise InvalidArgument(f"the model's {name} is {getattr(self, name)}, not in 1..{limit}")
        if self.hidden % self.heads or not 0 <= self.first_position < self.positions:
            raise InvalidArgument(
                f"{self.heads} heads for {self.hidden}, or positions from {self.first_position}, do not fit"
            )
        if not 0 <= self.labels <= 1 << 16:
            raise InvalidArgument(f"{self.labels} labels are not in 0..{1 << 16}")

    @property
    def max_tokens(self) -> int:
        """The longest text, in tokens."""
        room = self.positions - self.first_position
        return min(room, self.longest or room)

    @property
    def width(self) -> int:
        """How many numbers a text becomes."""
        return self.labels or self.hidden


class EncoderLayer(nnx.Module):  # type: ignore[misc]
    """One post-norm layer (Vaswani et al., 2017; Devlin et al., 2019)."""

    def __init__(self, config: EncoderConfig, init: Init) -> None:
        self.heads, self.activation = config.heads, config.activation
        self.qkv = Linear(3 * config.hidden, config.hidden, init, bias=True)
        self.out = Linear(config.hidden, config.hidden, init, bias=True)
        self.attention_norm = LayerNorm(config.hidden, config.norm_eps, init)
        self.up = Linear(config.intermediate, config.hidden, init, bias=True)
        self.down = Linear(config.hidden, config.intermediate, init, bias=True)
        self.norm = LayerNorm(config.hidden, config.norm_eps, init)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x [B, L, hidden]; of each row the first ``lengths`` [B] tokens count."""
        x = self.attention_norm(x + self.out(self._mix(self.qkv(x), lengths)))
        return self.norm(x + self.down(ACTIVATIONS[self.activation](self.up(x))))

    def _mix(self, fused: jax.Array, lengths: jax.Array) -> jax.Array:
        shape = fused.shape[:2]
        q, k, v = (part.reshape(*shape, self.heads, -1) for part in jnp.split(fused, 3, axis=-1))
        mix = _mix_on_gpu if on_cudnn(q, jax.default_backend()) else _mix_anywhere
        return mix(q, k, v, lengths).reshape(*shape, -1)


def on_cudnn(q: Any, platform: str) -> bool:
    """Whether cuDNN attends from such queries [B, L, heads, head_dim]."""
    return platform in ("gpu", "cuda") and q.dtype == jnp.bfloat16 and suits_cudnn(q.shape[-1])


def _mix_on_gpu(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, by: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    known = jnp.maximum(lengths, 1)  # a row that only pads the batch has none
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=known, implementation=by)


def _mix_anywhere(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    scale, exact = q.shape[-1] ** -0.5, precision(q)
    mask = jnp.arange(k.shape[1]) < lengths[:, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=exact, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, :], scores * scale, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=exact, preferred_element_type=v.dtype)


class Encoder(nnx.Module):  # type: ignore[misc]
    """Embeddings, layers, and a classifier where the model has one."""

    def __init__(self, config: EncoderConfig, init: Init) -> None:
        self.config = config
        self.words = nnx.Param(init((config.vocab_size, config.hidden)))
        self.positions = nnx.Param(init((config.positions, config.hidden)))
        self.types = nnx.Param(init((config.types, config.hidden)))
        self.norm = LayerNorm(config.hidden, config.norm_eps, init)
        self.layers = nnx.List([EncoderLayer(config, init) for _ in range(config.layers)])
        if config.labels:
            self.dense = Linear(config.hidden, config.hidden, init, bias=True)
            self.classifier = Linear(config.labels, config.hidden, init, bias=True)

    def hidden(self, tokens: jax.Array, types: jax.Array, lengths: jax.Array) -> jax.Array:
        """Last layer's activations [B, L, hidden] of ``tokens`` and ``types`` [B, L], ``lengths`` [B]."""
        places = jnp.arange(tokens.shape[1])
        positions = self.positions[...][places + self.config.first_position]
        x = self.norm(self.words[...][tokens] + positions + self.types[...][types])
        for layer in self.layers:
            x = layer(x, lengths)
        return x

    def embed(self, tokens: jax.Array, types: jax.Array, lengths: jax.Array) -> jax.Array:
        """One float32 vector for each text [B, hidden]."""
        x = self.hidden(tokens, types, lengths).astype(jnp.float32)
        if self.config.pooling == "cls":
            pooled = x[:, 0]
        else:
            mask = jnp.arange(x.shape[1]) < lengths[:, None]
            pooled = jnp.where(mask[..., None], x, 0).sum(axis=1) / jnp.maximum(lengths, 1)[:, None]
        if not self.config.normalise:
            return pooled
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)

    def classify(self, tokens: jax.Array, types: jax.Array, lengths: jax.Array) -> jax.Array:
        """Float32 logits [B, labels]; of a cross-encoder's one label, the relevance of each pair."""
        first = self.hidden(tokens, types, lengths)[:, 0]
        return self.classifier(jnp.tanh(self.dense(first))).astype(jnp.float32)

    def __call__(self, tokens: jax.Array, types: jax.Array, lengths: jax.Array) -> jax.Array:
        """Float32 [B, width]: the logits of the model's classifier if it has one, else embeddings."""
        return (self.classify if self.config.labels else self.embed)(tokens, types, lengths)

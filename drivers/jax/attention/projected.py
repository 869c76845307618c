"""What attention is given: queries, keys and values as one product makes them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmos.drivers.jax.decoder.layers import LayerNorm, RMSNorm
from llmos.drivers.jax.decoder.rope import Turn, rotate


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of tokens in one array, ``fused`` [..., heads + 2 * kv_heads, head_dim].

    Queries and keys are yet to be normed, each by its own of ``norms`` if there are any, and then turned.
    """

    fused: jax.Array
    turn: Turn
    kv_heads: int
    norms: tuple[RMSNorm | LayerNorm, RMSNorm | LayerNorm] | None = None

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, turn: Turn) -> Projected:
        """Heads [..., heads or kv_heads, head_dim] side by side: XLA copies none that one product made."""
        fused = jnp.concatenate([q, k.astype(q.dtype), v.astype(q.dtype)], axis=-2)
        return cls(fused, turn, k.shape[-2])

    @property
    def heads(self) -> int:
        """How many heads the queries have."""
        return self.fused.shape[-2] - 2 * self.kv_heads

    def normed(self) -> jax.Array:
        """``fused`` with its queries and keys normed."""
        return self.fused if self.norms is None else jnp.concatenate(self._heads(), axis=-2)

    def parts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [..., heads, head_dim] and keys [..., kv_heads, head_dim], both turned, and values."""
        q, k, v = self._heads()
        return rotate(q, *self.turn), rotate(k, *self.turn), v

    def _heads(self) -> list[jax.Array]:
        q, k, v = jnp.split(self.fused, [self.heads, self.heads + self.kv_heads], axis=-2)
        return [q, k, v] if self.norms is None else [self.norms[0](q), self.norms[1](k), v]

"""What attention is given: queries, keys and values as one product makes them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llmos.drivers.jax.layers import LayerNorm, RMSNorm
from llmos.drivers.jax.rope import rotate


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of tokens in one array, ``fused`` [..., heads + 2 * kv_heads, head_dim].

    Queries and keys are yet to be normed, each by its own of ``norms`` if there are any, and then turned, by
    ``cos`` and ``sin`` [..., n / 2] (see ``rope.rotate``).
    """

    fused: jax.Array
    cos: jax.Array
    sin: jax.Array
    kv_heads: int
    norms: tuple[RMSNorm | LayerNorm, RMSNorm | LayerNorm] | None = None

    @property
    def heads(self) -> int:
        """How many heads the queries have."""
        return self.fused.shape[-2] - 2 * self.kv_heads

    def parts(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [..., heads, head_dim] and keys [..., kv_heads, head_dim], both turned, and values."""
        q, k, v = jnp.split(self.fused, [self.heads, self.heads + self.kv_heads], axis=-2)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        return rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), v

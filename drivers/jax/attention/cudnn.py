"""Which attention cuDNN does, by ``jax.nn.dot_product_attention``."""

from __future__ import annotations

LARGEST_HEAD = 128  # values of a head that it takes on every GPU


def suits_cudnn(head_dim: int) -> bool:
    """Whether cuDNN's attention takes heads of this size; it wants a multiple of 8."""
    return head_dim <= LARGEST_HEAD and head_dim % 8 == 0

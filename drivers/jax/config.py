"""What a decoder looks like, in one neutral form that every family maps its own configuration to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.ipc.errors import InvalidArgument

_LIMITS = {
    "vocab_size": 1 << 21,
    "hidden": 1 << 16,
    "layers": 1 << 10,
    "heads": 1 << 10,
    "intermediate": 1 << 19,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder.

    ``rope_factors`` divides each of the ``head_dim // 2`` rotary frequencies; empty means no scaling.
    ``tied`` means that the output head is the embedding.
    """

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    rope_factors: tuple[float, ...] = ()
    tied: bool = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 0 < getattr(self, name) <= limit:
                raise InvalidArgument(f"the model's {name} is {getattr(self, name)}, not in 1..{limit}")
        if self.kv_heads <= 0 or self.heads % self.kv_heads:
            raise InvalidArgument(f"{self.heads} heads cannot share {self.kv_heads} KV heads")
        if self.head_dim <= 0 or self.head_dim % 2:
            raise InvalidArgument(f"head_dim {self.head_dim} is not a positive even number")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise InvalidArgument(f"{len(self.rope_factors)} rope factors for head_dim {self.head_dim}")

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def require(config: dict[str, Any], key: str) -> Any:
    """A value of a model's configuration; its absence is refused by name."""
    if config.get(key) is None:
        raise InvalidArgument(f"the model's configuration lacks '{key}'")
    return config[key]

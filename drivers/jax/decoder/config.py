"""What a decoder looks like, in one neutral form that every family maps its own configuration to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmos.ipc.errors import InvalidArgument

_LIMITS = {
    "vocab_size": 1 << 21,
    "hidden": 1 << 16,
    "layers": 1 << 10,
    "heads": 1 << 10,
    "intermediate": 1 << 19,
}
_MAX_EXPERTS = 1 << 12


Activation = Literal["silu", "gelu", "gelu_tanh"]
Norm = Literal["rms", "rms_unit", "layer"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder; what has a default is what families differ in.

    ``rope_theta`` 0 means no rotary embedding; ``rotary`` is how many components of a head are turned (0:
    all), and ``rope_factors`` divides each of their ``rotary // 2`` frequencies; empty means no scaling. In
    contexts longer than ``rope_original``, ``rope_long_factors`` take their place, if there are any;
    ``rope_scale`` multiplies cosines and sines. ``tied`` means that the output head is the embedding.
    ``windows`` gives each layer's sliding window in tokens (0: all), empty for none; windowed layers have
    the rotary base ``local_theta``, unscaled, unless that is 0. ``attention_scale`` 0 means
    head_dim ** -0.5, and a cap of 0 none. ``norm`` "rms_unit" is a root-mean-square norm whose stored scale
    lacks its 1. With ``experts``, layers but ``dense_layers`` have that many experts of
    ``expert_intermediate``, and a token goes to ``active_experts`` of them.
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
    rotary: int = 0
    rope_long_factors: tuple[float, ...] = ()
    rope_original: int = 0
    rope_scale: float = 1.0
    local_theta: float = 0.0
    learned_positions: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    norm: Norm = "rms"
    post_norms: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    normalise_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 0 < getattr(self, name) <= limit:
                raise InvalidArgument(f"the model's {name} is {getattr(self, name)}, not in 1..{limit}")
        if self.kv_heads <= 0 or self.heads % self.kv_heads:
            raise InvalidArgument(f"{self.heads} heads cannot share {self.kv_heads} KV heads")
        if self.head_dim <= 0 or self.head_dim % 2:
            raise InvalidArgument(f"head_dim {self.head_dim} is not a positive even number")
        if not 0 <= self.rotary <= self.head_dim or self.rotary % 2:
            raise InvalidArgument(f"{self.rotary} rotary components do not fit head_dim {self.head_dim}")
        for factors in (self.rope_factors, self.rope_long_factors):
            if factors and (len(factors) != self.rotary_dim // 2 or min(factors) <= 0):
                raise InvalidArgument(f"the rope factors {factors} do not fit {self.rotary_dim} components")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise InvalidArgument(
                f"the windows {self.windows} are not one per layer for {self.layers} layers"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if not 0 <= self.experts <= _MAX_EXPERTS:
            raise InvalidArgument(f"the model's experts are {self.experts}, not in 0..{_MAX_EXPERTS}")
        if self.experts and not (0 < self.active_experts <= self.experts and self.expert_intermediate > 0):
            raise InvalidArgument(
                f"{self.active_experts} of {self.experts} experts of {self.expert_intermediate} is no choice"
            )

    @property
    def rotary_dim(self) -> int:
        """Components of a head that are turned."""
        return (self.rotary or self.head_dim) if self.rope_theta else 0

    def window(self, layer: int) -> int:
        """The sliding window of a layer in tokens; 0 if it sees everything."""
        return self.windows[layer] if self.windows else 0

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts > 0 and layer not in self.dense_layers

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

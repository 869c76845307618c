"""The adapters of one model: which products can have one, their stacks among the weights, and who has which
place in them. How they are multiplied is in ``lora``, how they are read in ``weights.peft``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.layers import Init
from llmos.drivers.jax.decoder.modules import Decoder, struct
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import Busy, InvalidArgument, NotFound

MOST = 1024
WIDEST = 512
Pair = tuple[Any, Any]
_NAMES = ("lora_a", "lora_b")


class Target(NamedTuple):
    """A product that can have adapters: its inputs, and the outputs that are fused in it."""

    inner: int
    parts: tuple[int, ...]


def targets(config: DecoderConfig) -> dict[str, Target]:
    """Those of a decoder by path, in the order of its parameters; experts and routers are not among them."""
    found = {}
    for layer in range(config.layers):
        at = f"layers.{layer}"
        sizes = (config.query_size, config.kv_size, config.kv_size)
        found[f"{at}.attention.qkv"] = Target(config.hidden, sizes)
        found[f"{at}.attention.out"] = Target(config.query_size, (config.hidden,))
        if not config.sparse(layer):
            first, count = ("gate_up", 2) if config.gated else ("up", 1)
            found[f"{at}.mlp.{first}"] = Target(config.hidden, (config.intermediate,) * count)
            found[f"{at}.mlp.down"] = Target(config.intermediate, (config.hidden,))
    return found


def check(request: LoadRequest) -> None:
    """Refuse numbers that make no sense, and meshes that cut a model."""
    if not 0 <= request.adapters <= MOST:
        raise InvalidArgument(f"adapters is {request.adapters}, not in 0..{MOST}")
    if request.adapters and not 1 <= request.adapter_rank <= WIDEST:
        raise InvalidArgument(f"adapter_rank is {request.adapter_rank}, not in 1..{WIDEST}")
    if request.adapters and any(size > 1 for axis, size in request.mesh.items() if axis != "data"):
        raise InvalidArgument(
            "a model that is cut over several devices has no adapters: leave adapters 0, or use only "
            "the data axis"
        )


def make_room(decoder: Decoder, config: DecoderConfig, adapters: int, rank: int, init: Init) -> None:
    """Give every product of a decoder that can have adapters its stacks."""
    for path, target in targets(config).items():
        product: Any = decoder
        for name in path.split("."):
            product = product[int(name)] if name.isdigit() else getattr(product, name)
        product.adapt(target.parts, adapters, rank, init)


def is_stack(path: str) -> bool:
    """Whether a parameter is one of the stacks, which no checkpoint has."""
    return path.rpartition(".")[2] in _NAMES


def empty(shapes: dict[str, Any]) -> dict[str, jax.Array]:
    """The stacks among parameters, without an adapter in them."""
    return {
        path: jnp.zeros(x.shape, x.dtype, device=x.sharding) for path, x in shapes.items() if is_stack(path)
    }


@dataclass(frozen=True)
class Room:
    """That of a model for adapters of up to ``rank``: (A, B) of each target are at ``places`` among the
    parameters, in ``dtype``; at ``plain`` is what a model without room has. ``decoder`` is the graph and the
    tree of one that has the stacks."""

    config: DecoderConfig
    rank: int
    dtype: Any
    places: tuple[tuple[int, int], ...]
    plain: tuple[int, ...]
    decoder: tuple[Any, Any]

    def without(self, weights: list[Any]) -> list[Any]:
        """Of all parameters those that plain programs take: what they do not need would cost time a call."""
        return [weights[at] for at in self.plain]


def room(config: DecoderConfig, rank: int, paths: list[str], dtype: Any, decoder: tuple[Any, Any]) -> Room:
    """The room that ``make_room`` made; ``paths`` are those of the parameters."""
    index = {path: at for at, path in enumerate(paths)}
    a, b = _NAMES
    places = tuple((index[f"{path}.{a}"], index[f"{path}.{b}"]) for path in targets(config))
    plain = tuple(at for path, at in index.items() if not is_stack(path))
    return Room(config, rank, dtype, places, plain, decoder)


def pairs(stacks: list[Pair]) -> list[Pair]:
    """The shapes of one adapter's (A, B) for stacks of [n, P * rank, in] and [out, n, rank]."""
    return [
        (struct(a.shape[1:], a.dtype, a.sharding), struct((b.shape[0], b.shape[2]), b.dtype, b.sharding))
        for a, b in stacks
    ]


def put(stacks: list[Pair], own: list[Pair], index: jax.Array) -> list[Pair]:
    """The stacks with an adapter's (A, B) at ``index``."""
    return [
        (a.at[index].set(mine), b.at[:, index].set(its))
        for (a, b), (mine, its) in zip(stacks, own, strict=True)
    ]


class Table:
    """Which adapters of a model are loaded: ``numbers`` from 1 on, which ledgers see."""

    def __init__(self, adapters: int) -> None:
        self._free = list(range(adapters, 0, -1))
        self.size = adapters
        self.numbers: dict[str, int] = {}

    def check_room(self, name: str) -> None:
        """Busy where no number is free, InvalidArgument where there never is."""
        if not self.size:
            raise InvalidArgument(
                "the model was loaded without room for adapters: set max_adapters in the manifest"
            )
        if name not in self.numbers and not self._free:
            raise Busy(f"all {self.size} adapters that fit are loaded: unload one, or raise max_adapters")

    def take(self, name: str) -> int:
        """The number of an adapter that has arrived; the old one if it is here already."""
        self.check_room(name)
        if name not in self.numbers:
            self.numbers[name] = self._free.pop()
        return self.numbers[name]

    def number(self, name: str) -> int:
        if name not in self.numbers:
            raise NotFound(f"adapter {name} is not loaded here")
        return self.numbers[name]

    def drop(self, name: str) -> None:
        """Another may have its number."""
        self._free.append(self.numbers.pop(name))

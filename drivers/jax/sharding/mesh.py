"""What a mesh asks of the devices and the model, and which devices make which replica. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.ipc.errors import InvalidArgument

INNER = ("sequence", "expert", "tensor")
"""The axes of the mesh that one program runs over; the others are made of several programs."""


@dataclass(frozen=True)
class Axes:
    """The size of each axis: ``data`` replicas of ``pipeline`` stages, each a mesh of the other three.

    Heads are cut over the expert and tensor axes, KV pages over the sequence axis, experts over the expert
    axis, and dense MLPs and the vocabulary over all three, so that no device only repeats another's work.
    """

    data: int = 1
    pipeline: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return prod(getattr(self, field.name) for field in fields(self))

    @property
    def parts(self) -> int:
        """Into how many parts heads are cut."""
        return self.tensor * self.expert

    @property
    def slices(self) -> int:
        """Into how many parts dense MLPs and the vocabulary are cut."""
        return self.parts * self.sequence

    @property
    def heads(self) -> tuple[str, ...]:
        """The axes that heads are cut over."""
        return self.named("expert", "tensor")

    @property
    def wide(self) -> tuple[str, ...]:
        """The axes that dense MLPs and the vocabulary are cut over."""
        return self.named(*INNER)

    def named(self, *names: str) -> tuple[str, ...]:
        """Those of the axes that are longer than one."""
        return tuple(name for name in names if getattr(self, name) > 1)


def parse(mesh: dict[str, int]) -> Axes:
    """The axes of a request; what is not named is 1."""
    known = [field.name for field in fields(Axes)]
    for name, size in mesh.items():
        if name not in known:
            raise InvalidArgument(f"mesh axis '{name}' is not known; known: {', '.join(sorted(known))}")
        if size < 1:
            raise InvalidArgument(f"mesh axis {name} is {size}; it must be 1 or more")
    return Axes(**mesh)


def check_devices(axes: Axes, available: int) -> None:
    """Refuse a mesh that takes more devices than there are."""
    if axes.devices > available:
        sizes = _product(axes, *(field.name for field in fields(axes)))
        raise InvalidArgument(
            f"the mesh {sizes} takes {axes.devices} devices and this driver has {available}; "
            "lower an axis, or give the driver more devices"
        )


def check_model(axes: Axes, config: DecoderConfig) -> None:
    """Refuse a mesh that this model cannot be cut by, with the numbers that do not divide."""
    if axes.pipeline > config.layers:
        raise InvalidArgument(
            f"mesh axis pipeline is {axes.pipeline}, but the model has {config.layers} layers, "
            "and a stage holds at least one"
        )
    cut = _product(axes, "expert", "tensor")
    _divides(config.heads, axes.parts, "heads", cut)
    if config.kv_heads % axes.parts and axes.parts % config.kv_heads:
        raise InvalidArgument(
            f"{config.kv_heads} KV heads are neither divided by nor repeated over {cut}; "
            f"one of {config.kv_heads} and {axes.parts} must divide the other"
        )
    if any(not config.sparse(layer) for layer in range(config.layers)):
        _divides(config.intermediate, axes.slices, "intermediate", _product(axes, *INNER))
    if axes.expert > 1 and not config.experts:
        raise InvalidArgument(f"mesh axis expert is {axes.expert}, but the model has no experts: use tensor")
    _divides(config.experts, axes.expert, "experts", _product(axes, "expert"))
    if config.experts:
        inner = axes.sequence * axes.tensor
        _divides(
            config.expert_intermediate, inner, "expert intermediate", _product(axes, "sequence", "tensor")
        )


def _product(axes: Axes, *names: str) -> str:
    """The axes that something is cut by, for a person."""
    return " x ".join(f"{name} {getattr(axes, name)}" for name in axes.named(*names)) or "1"


def _divides(size: int, parts: int, what: str, cut: str) -> None:
    if size % parts:
        good = [n for n in range(1, min(size, parts) + 1) if size % n == 0]
        raise InvalidArgument(
            f"the model's {what} {size} cannot be cut by {cut}; the largest that divides it is {good[-1]}"
        )


def replicas(devices: Sequence[Any], axes: Axes) -> list[list[Any]]:
    """The devices of each replica, neighbours together."""
    each = axes.devices // axes.data
    return [list(devices[i * each : (i + 1) * each]) for i in range(axes.data)]


def make_mesh(devices: Sequence[Any], axes: Axes) -> Mesh:
    """The mesh that one program runs over."""
    return Mesh(np.asarray(devices).reshape([getattr(axes, name) for name in INNER]), INNER)

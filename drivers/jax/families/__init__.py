"""Model families. A family is one file: how its configuration and its tensor names map to the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.weights.source import Format, Source
from llmos.ipc.errors import InvalidArgument


class Part(NamedTuple):
    """A source tensor with ``rows`` on its first axis that becomes rows of a parameter."""

    name: str
    rows: int
    transform: Callable[[np.ndarray], np.ndarray] | None = None


Rules = Mapping[str, tuple[Part, ...]]
"""Parameter path, joined by dots -> the source tensors that are stacked along its first axis."""


@dataclass(frozen=True)
class Family:
    """``architectures`` are the names by which ``config.json`` ("architectures") and GGUF call it."""

    name: str
    architectures: Mapping[Format, tuple[str, ...]]
    configure: Mapping[Format, Callable[[Source], DecoderConfig]]
    rules: Callable[[DecoderConfig, Format], Rules]


def families() -> list[Family]:
    """All families that this driver knows."""
    from llmos.drivers.jax.families import llama

    return [llama.FAMILY]


def find(source: Source) -> Family:
    """The family of a checkpoint; an unknown one is refused with the list of the known ones."""
    if source.format == "gguf":
        names = [str(source.config.get("general.architecture"))]
    else:
        names = [str(name) for name in source.config.get("architectures") or ["(none)"]]
    for family in families():
        if set(names) & set(family.architectures[source.format]):
            return family
    known = ", ".join(name for family in families() for name in family.architectures[source.format])
    raise InvalidArgument(f"unknown architecture {names[0]}; known in {source.format} files: {known}")


def by_name(name: str) -> Family:
    """The family with this name."""
    for family in families():
        if family.name == name:
            return family
    raise InvalidArgument(f"unknown family {name}; known: {', '.join(f.name for f in families())}")

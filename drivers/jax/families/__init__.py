"""Model families. A family is one file: how its configuration and its tensor names map to the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.weights.source import Format, Source
from llmos.ipc.errors import InvalidArgument

Transform = Callable[[np.ndarray], np.ndarray]


class Part(NamedTuple):
    """A source tensor that becomes ``rows`` of a parameter, after ``transform``.

    In the source it has that many rows, and the parameter's other axes, unless ``shape`` says otherwise.
    """

    name: str
    rows: int
    transform: Transform | None = None
    shape: tuple[int, ...] = ()


Rules = Mapping[str, tuple[Part, ...]]
"""Parameter path, joined by dots -> the source tensors that are stacked along its first axis."""


@dataclass(frozen=True)
class Family:
    """``architectures`` are the names by which ``config.json`` ("architectures") and GGUF call it.

    A format that is not listed is not read. The source of ``rules`` tells by its tensors how it names them.
    """

    name: str
    architectures: Mapping[Format, tuple[str, ...]]
    configure: Mapping[Format, Callable[[Source], DecoderConfig]]
    rules: Callable[[DecoderConfig, Source], Rules]


def families() -> list[Family]:
    """All families that this driver knows."""
    from llmos.drivers.jax.families import gemma, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen3

    modules = (llama, mistral, qwen2, qwen3, gemma, phi3, gpt2, mixtral)
    return [family for module in modules for family in module.FAMILIES]


def find(source: Source) -> Family:
    """The family of a checkpoint; an unknown one is refused with the list of the known ones."""
    if source.format == "gguf":
        names = [str(source.config.get("general.architecture"))]
    else:
        names = [str(name) for name in source.config.get("architectures") or ["(none)"]]
    for family in families():
        if set(names) & set(family.architectures.get(source.format, ())):
            return family
    known = ", ".join(name for family in families() for name in family.architectures.get(source.format, ()))
    raise InvalidArgument(f"unknown architecture {names[0]}; known in {source.format} files: {known}")


def by_name(name: str) -> Family:
    """The family with this name."""
    for family in families():
        if family.name == name:
            return family
    raise InvalidArgument(f"unknown family {name}; known: {', '.join(f.name for f in families())}")

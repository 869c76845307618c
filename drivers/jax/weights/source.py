"""What the converter needs of a checkpoint file, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llmos.ipc.errors import InvalidArgument, NotFound

Format = Literal["gguf", "safetensors"]


class Source(Protocol):
    """An open checkpoint: its format, its configuration, and its tensors by name.

    ``config`` is ``config.json`` of a safetensors folder (with ``generation_config.json`` merged below
    it), or the scalar metadata of a GGUF file.
    """

    format: Format
    config: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, outermost axis first; None where there is no such tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor in a floating-point dtype; InvalidArgument names it when its data is cut off."""
        ...


def open_source(path: str) -> Source:
    """Open a GGUF file or a folder of safetensors."""
    from llmos.drivers.jax.weights.gguf import GGUFSource
    from llmos.drivers.jax.weights.random import PREFIX, RandomSource
    from llmos.drivers.jax.weights.safetensors import SafetensorsSource

    if path.startswith(PREFIX):
        return RandomSource(path.removeprefix(PREFIX))
    where = Path(path)
    if not where.exists():
        raise NotFound(f"no model at {path}")
    if where.is_dir():
        return SafetensorsSource(where)
    with where.open("rb") as file:
        if file.read(4) == b"GGUF":
            return GGUFSource(where)
    raise InvalidArgument(f"{path} is neither a GGUF file nor a folder of safetensors with config.json")


def files_of(path: str) -> list[Path]:
    """The files that decide what a source holds, in a fixed order."""
    where = Path(path)
    if not where.is_dir():
        return [where]
    return sorted(file for file in where.iterdir() if file.suffix in (".json", ".safetensors"))

"""Folders of safetensors with ``config.json``, in one file or in shards with an index.

The container is a length, a JSON header and raw data; it is read here because the library's NumPy side
lacks bfloat16 and its errors do not name the tensor.
"""

from __future__ import annotations

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmos.drivers.jax.weights.source import Format
from llmos.ipc.errors import InvalidArgument

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_MAX_HEADER = 100 << 20
_MAX_JSON = 64 << 20


class Tensor(NamedTuple):
    """Where a tensor lies in its file, ``start`` to ``end`` in bytes."""

    file: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsSource:
    """An open folder of safetensors."""

    format: Format = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = {}
        for name in ("generation_config.json", "config.json"):
            if name == "config.json" or (folder / name).exists():
                self.config |= read_json(folder / name)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InvalidArgument(f"{folder} holds no .safetensors file")
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            self._tensors |= open_file(file)
        self._check_index(folder / "model.safetensors.index.json")

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensors.get(name)
        return tensor.shape if tensor else None

    def read(self, name: str) -> np.ndarray:
        return read_tensor(name, self._tensors[name])

    def _check_index(self, index: Path) -> None:
        if not index.exists():
            return
        missing = [name for name in read_json(index).get("weight_map", {}) if name not in self._tensors]
        if missing:
            raise InvalidArgument(f"tensor '{missing[0]}' is in {index.name} but in no shard of the folder")


def read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """The values of a tensor; InvalidArgument says, by its name, what is wrong with it."""
    if tensor.dtype not in _DTYPES:
        raise InvalidArgument(f"tensor '{name}' is in {tensor.dtype}, which is not read")
    dtype = np.dtype(_DTYPES[tensor.dtype])
    if tensor.end - tensor.start != prod(tensor.shape) * dtype.itemsize:
        raise InvalidArgument(f"tensor '{name}' has {tensor.end - tensor.start} bytes for {tensor.shape}")
    if tensor.start < 0 or tensor.end > len(tensor.file):
        raise InvalidArgument(f"tensor '{name}' is cut off: its file ends before its data does")
    values = np.frombuffer(tensor.file, dtype, prod(tensor.shape), tensor.start)
    return values.reshape(tensor.shape)


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name; InvalidArgument if it is none, or its header is not sound."""
    if not path.is_file():
        raise InvalidArgument(f"{path.parent} has no {path.name}")
    if path.stat().st_size < 8:
        raise InvalidArgument(f"{path.name} is not a sound safetensors file: its header is cut off")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data) - 8):
        raise InvalidArgument(f"{path.name} is not a sound safetensors file: its header is cut off")
    try:
        entries = json.loads(data[8 : 8 + size])
        return {
            name: Tensor(
                data,
                entry["dtype"],
                tuple(int(side) for side in entry["shape"]),
                8 + size + int(entry["data_offsets"][0]),
                8 + size + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as cause:
        raise InvalidArgument(f"{path.name} is not a sound safetensors file: bad header") from cause


def read_json(path: Path) -> dict[str, Any]:
    """An object from a small JSON file; InvalidArgument says what is wrong with it."""
    if not path.exists():
        raise InvalidArgument(f"{path.parent} has no {path.name}")
    if path.stat().st_size > _MAX_JSON:
        raise InvalidArgument(f"{path.name} is over {_MAX_JSON} bytes")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as cause:
        raise InvalidArgument(f"{path} is not JSON") from cause
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} is not a JSON object")
    return value

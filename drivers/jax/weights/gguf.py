"""GGUF files: a small reader of the container, and the gguf library for dequantizing.

The container is parsed here because the library's reader makes an array of every string of the tokenizer,
which takes seconds, and because limits and errors have to be ours. Format: ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmos.drivers.jax.weights.source import Format
from llmos.ipc.errors import InvalidArgument

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 16
_MAX_STRING = 1 << 24
_MAX_ARRAY = 1 << 24
_KEPT_ARRAY = 1 << 12


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


class GGUFSource:
    """An open GGUF file; long arrays of its metadata (the tokenizer's) are skipped."""

    format: Format = "gguf"

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._path = path
        self._at = 0
        self.config: dict[str, Any] = {}
        self._tensors: dict[str, _Tensor] = {}
        try:
            self._parse()
        except (struct.error, ValueError, KeyError, OverflowError) as cause:
            raise InvalidArgument(f"{path.name} is not a sound GGUF file: its header is cut off") from cause

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensors.get(name)
        return tensor.shape if tensor else None

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        if not prod(tensor.shape) or tensor.shape[-1] % block:
            raise InvalidArgument(
                f"tensor '{name}' of shape {list(tensor.shape)} is no rows of {block}-blocks"
            )
        row_bytes = tensor.shape[-1] // block * block_bytes
        size = prod(tensor.shape[:-1]) * row_bytes
        start = self._start + tensor.offset
        if start + size > len(self._data):
            raise InvalidArgument(f"tensor '{name}' is cut off: {self._path.name} ends before its data does")
        raw = np.frombuffer(self._data, np.uint8, size, start)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], row_bytes), tensor.kind)
        except NotImplementedError as cause:
            raise InvalidArgument(f"tensor '{name}' is in {tensor.kind.name}, which is not read") from cause
        return np.asarray(values).reshape(tensor.shape)

    def _parse(self) -> None:
        if self._take("4s") != b"GGUF" or self._take("I") not in (2, 3):
            raise InvalidArgument(f"{self._path.name} is not a GGUF file of version 2 or 3")
        tensors, entries = self._take("Q"), self._take("Q")
        if max(tensors, entries) > _MAX_ENTRIES:
            raise InvalidArgument(f"{self._path.name} claims {tensors} tensors, {entries} entries")
        for _ in range(entries):
            key = self._string()
            self.config[key] = self._value(self._take("I"))
        for _ in range(tensors):
            name = self._string()
            shape = tuple(self._take("Q") for _ in range(self._dimensions(name)))
            self._tensors[name] = _Tensor(shape[::-1], GGMLQuantizationType(self._take("I")), self._take("Q"))
        alignment = int(self.config.get("general.alignment", 32))
        if alignment < 1 or alignment > 1 << 20:
            raise InvalidArgument(f"{self._path.name} has an alignment of {alignment}")
        self._start = -(-self._at // alignment) * alignment

    def _dimensions(self, name: str) -> int:
        count = int(self._take("I"))
        if count > 4:
            raise InvalidArgument(f"tensor '{name}' has {count} dimensions, over 4")
        return count

    def _take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._bytes().decode()

    def _bytes(self) -> bytes:
        size = self._take("Q")
        if size > min(_MAX_STRING, len(self._data) - self._at):
            raise ValueError(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._bytes().decode(errors="replace")
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        inner, count = self._take("I"), self._take("Q")
        if depth > 1 or count > _MAX_ARRAY:
            raise ValueError(count)
        if inner in _SCALARS and count > _KEPT_ARRAY:
            self._at += count * struct.calcsize("<" + _SCALARS[inner])
            return None
        if count <= _KEPT_ARRAY:
            return [self._value(inner, depth + 1) for _ in range(count)]
        for _ in range(count):
            self._skip(inner, depth)
        return None

    def _skip(self, kind: int, depth: int) -> None:
        if kind != _STRING:
            self._value(kind, depth + 1)
            return
        size = struct.unpack_from("<Q", self._data, self._at)[0]
        self._at += 8 + size

"""The metadata of a GGUF file (versions 2 and 3), read without its tensors.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is checked against a limit
before anything is allocated, since the file may come from anywhere.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from llmos.ipc.errors import InvalidArgument, IOFailure

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 4096
MAX_STRING = 16 << 20
MAX_ARRAY = 4 << 20
MAX_BYTES = 256 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file; InvalidArgument if it is none, IOFailure if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).metadata()
    except OSError as error:
        raise IOFailure(f"cannot read {path}: {error.strerror}") from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = MAX_BYTES

    def metadata(self) -> dict[str, Any]:
        if self._file.read(4) != MAGIC:
            raise InvalidArgument(f"{self._path} is no GGUF file")
        version, _tensors, pairs = self._unpack("<IQQ")
        if version not in VERSIONS:
            raise InvalidArgument(f"{self._path} is GGUF version {version}; versions 2 and 3 are read")
        if pairs > MAX_KEYS:
            raise InvalidArgument(f"{self._path} has {pairs} metadata keys, over {MAX_KEYS}")
        return {self._string(): self._value(self._unpack("<I")[0]) for _ in range(pairs)}

    def _take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise InvalidArgument(f"{self._path}: the metadata exceeds {MAX_BYTES} bytes")
        data = self._file.read(size)
        if len(data) != size:
            raise InvalidArgument(f"{self._path} ends within its metadata")
        return data

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _string(self) -> str:
        (size,) = self._unpack("<Q")
        if size > MAX_STRING:
            raise InvalidArgument(f"{self._path}: a string of {size} bytes exceeds {MAX_STRING}")
        return self._take(size).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._unpack(f"<{self._layout(kind)}")[0]

    def _array(self) -> list[Any]:
        kind, count = self._unpack("<IQ")
        if count > MAX_ARRAY:
            raise InvalidArgument(f"{self._path}: an array of {count} items exceeds {MAX_ARRAY}")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        # Arrays of arrays are allowed by the format and used by nobody.
        return list(self._unpack(f"<{count}{self._layout(kind)}"))

    def _layout(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise InvalidArgument(f"{self._path}: metadata type {kind} is not known")
        return _SCALARS[kind]

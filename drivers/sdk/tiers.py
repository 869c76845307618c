"""Where pages go when they leave the device: blocks of one page each, in RAM and on disk.

What lies on disk is sealed with the key of the tenant whose it is, and bound to its place and to the time it
was written: the associated data name the file, the model, the block and how often it has been written.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from llmos.drivers.sdk.driver import Bytes, Finish, PendingMove
from llmos.drivers.sdk.messages import Move, Moved
from llmos.ipc import paths
from llmos.ipc.errors import IOFailure, NoMemory
from llmos.services.security import keys

_ALIGN = 4096


class Blocks(Protocol):
    """A tier in RAM."""

    def __getitem__(self, block: int) -> memoryview: ...
    def __setitem__(self, block: int, data: Bytes) -> None: ...


class HostTier:
    """Blocks in RAM, taken at once: page-aligned, in huge pages where the system has them, and touched when
    they are first written."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._size = block_bytes
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, max(1, blocks * block_bytes), flags=flags)
        except OSError as error:
            raise NoMemory(f"{blocks} host pages of {block_bytes} bytes: {error.strerror}") from None
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(memory)

    def __getitem__(self, block: int) -> memoryview:
        """The bytes of a block, to read."""
        return self._memory[block * self._size : (block + 1) * self._size].toreadonly()

    def __setitem__(self, block: int, data: Bytes) -> None:
        self._memory[block * self._size : (block + 1) * self._size] = data


class DiskTier:
    """Blocks in a file without a name, so that nothing is left of it when the process ends, however it ends.

    The file is sparse: it takes the room of the blocks that were written, at most ``blocks`` of them.
    """

    def __init__(self, folder: Path, model: str, blocks: int, block_bytes: int) -> None:
        self._size = block_bytes
        self._stride = -(-(block_bytes + keys.OVERHEAD) // _ALIGN) * _ALIGN
        self._model = model.encode()
        self._file_id = secrets.token_bytes(16)
        self._writes = itertools.count(1)
        self._written: dict[int, int] = {}
        self._file = _open_nameless(folder, blocks * self._stride) if blocks else -1

    def write(self, block: int, data: Bytes, key: bytes) -> None:
        """Seal a block. NoMemory if the disk is full: the block then holds nothing."""
        self._written.pop(block, None)
        number = next(self._writes)
        sealed = memoryview(keys.seal(key, data, self._place(block, number)))
        try:
            done = 0
            while done < len(sealed):
                done += os.pwrite(self._file, sealed[done:], block * self._stride + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoMemory("the disk is full, so pages stay where they are: make room on it") from None
            raise IOFailure(f"block {block} was not written: {error.strerror}") from None
        self._written[block] = number

    def read(self, block: int, key: bytes) -> bytes:
        """Open a block; IOFailure if it is not what was written there last, or another tenant's."""
        number = self._written.get(block)
        if number is None:
            raise IOFailure(f"block {block} on disk holds nothing")
        size, sealed = self._size + keys.OVERHEAD, bytearray()
        try:
            while len(sealed) < size:
                part = os.pread(self._file, size - len(sealed), block * self._stride + len(sealed))
                if not part:
                    raise IOFailure(f"block {block} is cut short")
                sealed += part
        except OSError as error:
            raise IOFailure(f"block {block} was not read: {error.strerror}") from None
        return keys.unseal(key, bytes(sealed), self._place(block, number))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _place(self, block: int, number: int) -> bytes:
        return b"page" + self._file_id + block.to_bytes(8, "big") + number.to_bytes(8, "big") + self._model


class Tiers:
    """Both tiers of one model."""

    def __init__(self, model: str, block_bytes: int, host: Blocks, disk_pages: int) -> None:
        self.block_bytes = block_bytes
        self.host = host
        self.disk = DiskTier(paths.state_dir() / "pages", model, disk_pages, block_bytes)

    def get(self, tier: str, block: int, key: bytes) -> Bytes:
        """The bytes of a block; those of the host tier in place."""
        return self.host[block] if tier == "host" else self.disk.read(block, key)

    def put(self, tier: str, block: int, data: Bytes, key: bytes) -> None:
        if tier == "host":
            self.host[block] = data
        else:
            self.disk.write(block, data, key)

    def move(self, move: Move, key: bytes) -> PendingMove:
        """A move that does not touch the device."""

        def copy() -> Finish:
            began = time.perf_counter()
            for source, target in move.pages:
                self.put(move.target, target, self.get(move.source, source, key), key)
            moved = Moved(len(move.pages) * self.block_bytes, round((time.perf_counter() - began) * 1e6))
            return lambda: moved

        return copy

    def close(self) -> None:
        self.disk.close()


def _open_nameless(folder: Path, size: int) -> int:
    """A file of ``size`` bytes that only this process can reach."""
    path = paths.private_dir(folder) / secrets.token_hex(8)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        path.unlink()
        os.ftruncate(file, size)
    except OSError as error:
        raise IOFailure(f"no file for {size} bytes of pages in {folder}: {error.strerror}") from None
    return file

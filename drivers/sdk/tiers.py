"""Where pages go when they leave the device: blocks of one page each."""

from __future__ import annotations

import mmap

from llmos.ipc.errors import NoMemory


class HostTier:
    """Blocks in RAM, taken at once: page-aligned, and touched when they are first written."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._size = block_bytes
        try:
            self._memory = memoryview(mmap.mmap(-1, max(1, blocks * block_bytes)))
        except OSError as error:
            raise NoMemory(f"{blocks} host pages of {block_bytes} bytes: {error.strerror}") from None

    def __getitem__(self, block: int) -> memoryview:
        """The bytes of a block, to read and to write."""
        return self._memory[block * self._size : (block + 1) * self._size]

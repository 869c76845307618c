"""The way between a device and RAM: pages as arrays, page-locked where the device is behind a bus.

A device copies page-locked memory by itself, at the speed of its bus. So a page that leaves it is kept as the
array it arrives in: nothing is copied by the CPU, and one that is written anew drops the one before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax import platform
from llmos.drivers.sdk.driver import Bytes
from llmos.ipc.errors import IOFailure, NoMemory

_NO_HOST_MEMORY = f"the host has not got the memory for these pages, or {platform.PAGE_LOCKED}"


class Link:
    """Copies rows, arrays [width], between a device and RAM; where both are one, nothing is copied."""

    def __init__(self, device: Any, bus: bool | None = None) -> None:
        """``bus`` overrides whether the device is behind one."""
        behind = device.platform != "cpu" if bus is None else bus
        self._near = jax.sharding.SingleDeviceSharding(device)
        self._far = self._near.with_memory_kind("pinned_host") if behind else self._near

    def fetch(self, rows: Sequence[jax.Array | np.ndarray]) -> list[jax.Array]:
        """Begin to copy rows to RAM, where the device wants them."""
        with platform.lacking(_NO_HOST_MEMORY):
            return list(jax.device_put(list(rows), self._far))

    def send(self, rows: Sequence[jax.Array | np.ndarray]) -> list[jax.Array]:
        """Begin to copy rows to the device."""
        return list(jax.device_put(list(rows), self._near))


class RowTier:
    """Blocks in RAM, each the row that it came as. NoMemory if the machine has not got that much."""

    def __init__(self, link: Link, shape: Any, blocks: int) -> None:
        self._link = link
        self._shape = shape
        self._rows: dict[int, jax.Array] = {}
        size = shape.size * np.dtype(shape.dtype).itemsize
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if blocks * size > there:
            raise NoMemory(
                f"{blocks} host pages of {size} bytes are more than the {there} bytes of this machine"
            )

    def __getitem__(self, block: int) -> memoryview:
        """The bytes of a block, to read."""
        return view(self.row(block)).data

    def __setitem__(self, block: int, data: Bytes) -> None:
        self._rows[block] = self._link.fetch([np.frombuffer(data, self._shape.dtype)])[0]

    def row(self, block: int) -> jax.Array:
        """A block as it came; IOFailure if none did."""
        row = self._rows.get(block)
        if row is None:
            raise IOFailure(f"block {block} in RAM holds nothing")
        return row

    def keep(self, block: int, row: jax.Array) -> None:
        """Have a row, in RAM already, as a block."""
        self._rows[block] = row

    def close(self) -> None:
        self._rows.clear()


def view(row: jax.Array) -> np.ndarray:
    """The bytes of a row in RAM, in place."""
    row.block_until_ready()
    memory = (ctypes.c_uint8 * row.nbytes).from_address(row.unsafe_buffer_pointer())
    memory.row = row  # type: ignore[attr-defined]  # lives as long as the view does
    return np.ctypeslib.as_array(memory)

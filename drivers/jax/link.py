"""The way between a device and RAM: blocks are copied asynchronously, through memory it can reach."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

Fill = Callable[[np.ndarray], None]
"""Writes the bytes [n, page bytes] of a block."""


class Link(Protocol):
    """Blocks are arrays [n, width] on the device."""

    def fetch(self, block: jax.Array) -> jax.Array:
        """Begin to copy a block to RAM."""
        ...

    def send(self, shape: Any, fill: Fill) -> jax.Array:
        """Fill a block of this shape and begin to copy it to the device; used from one thread."""
        ...


class SharedMemory:
    """For a device that computes in RAM: nothing has to be copied but the pages themselves."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def fetch(self, block: jax.Array) -> jax.Array:
        return block

    def send(self, shape: Any, fill: Fill) -> jax.Array:
        # Fresh each time, since jax may use this very memory for as long as the block lives.
        rows = np.empty(shape.shape, shape.dtype)
        fill(rows.view(np.uint8))
        sent: jax.Array = jax.device_put(rows, self._device)
        return sent


class Pinned:
    """For a device behind a bus: blocks pass through page-locked memory, which it copies from by itself."""

    def __init__(self, device: Any) -> None:
        self._near = jax.sharding.SingleDeviceSharding(device)
        self._far = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._staging: dict[int, list[tuple[jax.Array, jax.Array | None]]] = {}

    def fetch(self, block: jax.Array) -> jax.Array:
        fetched: jax.Array = jax.device_put(block, self._far)
        return fetched

    def send(self, shape: Any, fill: Fill) -> jax.Array:
        """Two blocks of a size take turns: one is filled while the other is sent."""
        turns = self._staging.setdefault(shape.shape[0], [])
        if len(turns) < 2:
            empty = jax.device_put(np.zeros(shape.shape, shape.dtype), self._far, may_alias=False)
            turns.append((empty, None))
        else:
            turns.append(turns.pop(0))
        staging, sent = turns[-1]
        jax.block_until_ready((staging, sent))  # type: ignore[no-untyped-call]
        fill(view(staging))
        arriving: jax.Array = jax.device_put(staging, self._near, may_alias=False)
        turns[-1] = staging, arriving
        return arriving


def view(block: jax.Array) -> np.ndarray:
    """The bytes [n, page bytes] of a block in RAM, in place; the block must outlive it."""
    memory = (ctypes.c_uint8 * block.nbytes).from_address(block.unsafe_buffer_pointer())
    rows: np.ndarray = np.ctypeslib.as_array(memory).reshape(block.shape[0], -1)
    return rows


def open_link(device: Any) -> Link:
    """The link of a device."""
    return SharedMemory(device) if device.platform == "cpu" else Pinned(device)

"""Moves of one model's pages: dispatched beside the steps, copied on the SDK's worker thread.

A move is cut into blocks of a few sizes. Out: each is gathered on the device and fetched while the next is
gathered; the worker lays its rows into the tier. In: the worker fills and sends the blocks; when all have
arrived, the driver's thread dispatches the scatters, so no step waits for the bus.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from llmos.drivers.jax import pages
from llmos.drivers.jax.engine import Engine
from llmos.drivers.jax.link import Link, open_link, view
from llmos.drivers.sdk.driver import Finish, PendingMove
from llmos.drivers.sdk.messages import LoadedModel, Move, Moved
from llmos.drivers.sdk.tiers import Tiers

Pair = tuple[int, int]


class Device(Protocol):
    """What moves need of an engine; used on the driver's thread."""

    def read_pages(self, numbers: list[int]) -> jax.Array: ...
    def write_pages(self, numbers: list[int], block: jax.Array) -> None: ...


class Mover:
    """Carries out the moves of one model. ``caches`` are the shapes of its caches."""

    def __init__(self, device: Device, caches: Any, link: Link, tiers: Tiers) -> None:
        self._device = device
        self._caches = caches
        self._link = link
        self._tiers = tiers
        self._sizes = pages.block_sizes(caches)
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="copy")

    def move(self, move: Move, key: bytes) -> PendingMove:
        if move.source == "device":
            return self._out(move, key)
        if move.target == "device":
            return self._in(move, key)
        return self._tiers.move(move, key)

    def close(self) -> None:
        """Give back the tiers; no move is under way."""
        self._pool.shutdown()
        self._tiers.close()

    def _out(self, move: Move, key: bytes) -> PendingMove:
        blocks = []
        for part in self._parts(move.pages):
            gathered = self._device.read_pages([page for page, _ in part])
            blocks.append((part, gathered, self._link.fetch(gathered)))

        def copy() -> Finish:
            jax.block_until_ready(blocks[0][1:2] if blocks else [])  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            while blocks:
                part, _, fetched = blocks.pop(0)
                jax.block_until_ready(fetched)  # type: ignore[no-untyped-call]
                rows = view(fetched)
                self._each(part, lambda row, pair: self._store(move, pair[1], rows[row], key))  # noqa: B023
            return _moved(self._bytes(move), began)

        return copy

    def _in(self, move: Move, key: bytes) -> PendingMove:
        def copy() -> Finish:
            began = time.perf_counter()
            sent = []
            for part in self._parts(move.pages):

                def fill(rows: np.ndarray, part: list[Pair] = part) -> None:
                    self._each(part, lambda row, pair: self._recall(move, pair[0], rows[row], key))

                sent.append((part, self._link.send(pages.block(self._caches, len(part)), fill)))
            jax.block_until_ready([block for _, block in sent])  # type: ignore[no-untyped-call]
            moved = _moved(self._bytes(move), began)

            def finish() -> Moved:
                for part, block in sent:
                    self._device.write_pages([page for _, page in part], block)
                return moved()

            return finish

        return copy

    def _store(self, move: Move, block: int, row: np.ndarray, key: bytes) -> None:
        if move.target == "host":
            np.copyto(np.frombuffer(self._tiers.host[block], np.uint8), row)
        else:
            self._tiers.disk.write(block, row.data, key)

    def _recall(self, move: Move, block: int, row: np.ndarray, key: bytes) -> None:
        if move.source == "host":
            data: Any = self._tiers.host[block]
        else:
            data = self._tiers.disk.read(block, key)
        np.copyto(row, np.frombuffer(data, np.uint8))

    def _parts(self, pairs: list[Pair]) -> Iterator[list[Pair]]:
        at = 0
        for size in pages.parts(len(pairs), self._sizes):
            yield pairs[at : at + size]
            at += size

    def _each(self, part: list[Pair], act: Callable[[int, Pair], None]) -> None:
        """Act on every row of a block, several at once: NumPy and the cipher let other threads run."""
        list(self._pool.map(act, range(len(part)), part))

    def _bytes(self, move: Move) -> int:
        return len(move.pages) * pages.page_bytes(self._caches)


def open_mover(engine: Engine, loaded: LoadedModel, device: Any) -> Mover:
    """The mover of a model that was just loaded; NoMemory or IOFailure where a tier cannot be had."""
    caches = engine.caches
    sizes = pages.page_bytes(caches), loaded.host_pages, loaded.disk_pages
    return Mover(engine, caches, open_link(device), Tiers(loaded.model, *sizes))


def _moved(size: int, began: float) -> Finish:
    moved = Moved(size, round((time.perf_counter() - began) * 1e6))
    return lambda: moved

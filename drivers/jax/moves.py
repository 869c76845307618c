"""Moves of one model's pages: dispatched beside the steps, copied on the SDK's worker thread.

A move is cut into blocks of a few sizes. Out: each is gathered on the device and fetched while the next is
gathered; the worker lays its rows into the tier. In: the worker fills and sends the blocks; when all have
arrived, the driver's thread dispatches the scatters, so no step waits for the bus.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import jax
import numpy as np

from llmos.drivers.jax import pages
from llmos.drivers.jax.engine import Engine
from llmos.drivers.jax.link import Link, open_link, view
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.sdk.driver import Bytes, Finish, Get, PendingMove, Put
from llmos.drivers.sdk.messages import LoadedModel, Move, Moved, Tier
from llmos.drivers.sdk.tiers import Tiers


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
        self._page_bytes = pages.page_bytes(caches)
        self._sizes = pages.block_sizes(caches)
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="copy")

    def move(self, move: Move, key: bytes) -> PendingMove:
        sources, targets = [source for source, _ in move.pages], [target for _, target in move.pages]
        if move.source == "device":
            return self.save(sources, lambda i, data: self._store(move.target, targets[i], data, key))
        if move.target == "device":
            return self.restore(targets, lambda i: self._tiers.get(move.source, sources[i], key))
        return self._tiers.move(move, key)

    def close(self) -> None:
        """Give back the tiers; no move is under way."""
        self._pool.shutdown()
        self._tiers.close()

    def save(self, numbers: list[int], put: Put) -> PendingMove:
        """Read pages of the device; see ``Driver.save``."""
        blocks = []
        for part in self._parts(len(numbers)):
            gathered = self._device.read_pages([numbers[index] for index in part])
            blocks.append((part, gathered, self._link.fetch(gathered)))

        def copy() -> Finish:
            jax.block_until_ready(blocks[0][1:2] if blocks else [])  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            while blocks:
                part, _, fetched = blocks.pop(0)
                jax.block_until_ready(fetched)  # type: ignore[no-untyped-call]
                rows = view(fetched)
                self._each(part, lambda row, index: put(index, rows[row].data))  # noqa: B023
            return _moved(len(numbers) * self._page_bytes, began)

        return copy

    def restore(self, numbers: list[int], get: Get) -> PendingMove:
        """Write pages of the device; see ``Driver.restore``."""

        def copy() -> Finish:
            began = time.perf_counter()
            sent = []
            for part in self._parts(len(numbers)):

                def fill(rows: np.ndarray, part: range = part) -> None:
                    self._each(part, lambda row, index: _lay(rows[row], get(index)))

                sent.append((part, self._link.send(pages.block(self._caches, len(part)), fill)))
            jax.block_until_ready([block for _, block in sent])  # type: ignore[no-untyped-call]
            moved = _moved(len(numbers) * self._page_bytes, began)

            def finish() -> Moved:
                for part, block in sent:
                    self._device.write_pages([numbers[index] for index in part], block)
                return moved()

            return finish

        return copy

    def _store(self, tier: Tier, block: int, data: Bytes, key: bytes) -> None:
        if tier == "host":
            _lay(np.frombuffer(self._tiers.host[block], np.uint8), data)
        else:
            self._tiers.disk.write(block, data, key)

    def _parts(self, count: int) -> Iterator[range]:
        at = 0
        for size in pages.parts(count, self._sizes):
            yield range(at, at + size)
            at += size

    def _each(self, part: range, act: Callable[[int, int], None]) -> None:
        """Act on every row of a block, several at once: NumPy and the cipher let other threads run."""
        acts = [self._pool.submit(act, row, index) for row, index in enumerate(part)]
        # All of them end before an error is raised: the rows and the file must outlive them.
        wait(acts)
        for done in acts:
            done.result()


def open_movers(engines: list[Engine], loaded: LoadedModel) -> list[Mover]:
    """The mover of each replica of a model that was just loaded, each with tiers of its own; none where a
    replica is cut over several devices. NoMemory or IOFailure where a tier cannot be had."""
    movers = []
    for engine in engines:
        place, caches = engine.programs.spec.place, engine.programs.spec.caches
        if isinstance(place, OneDevice):
            sizes = pages.page_bytes(caches), loaded.host_pages, loaded.disk_pages
            movers.append(Mover(engine, caches, open_link(place.device), Tiers(loaded.model, *sizes)))
    return movers


def _lay(row: np.ndarray, data: Bytes) -> None:
    """Copy by NumPy, which lets other threads run meanwhile."""
    np.copyto(row, np.frombuffer(data, np.uint8))


def _moved(size: int, began: float) -> Finish:
    moved = Moved(size, round((time.perf_counter() - began) * 1e6))
    return lambda: moved

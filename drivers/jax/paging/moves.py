"""Moves of one model's pages: dispatched beside the steps, copied on the SDK's worker thread.

A move is cut into parts of a few sizes. Out: all are gathered on the device, in order with the steps, and
fetched one after the other. In: they are sent, and when all have arrived the driver's thread dispatches the
scatters, so no step waits for the bus.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.paging import pages
from llmos.drivers.jax.paging.link import Link, RowTier, view
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.sdk.driver import Finish, Get, PendingMove, Put
from llmos.drivers.sdk.messages import LoadedModel, Move, Moved
from llmos.drivers.sdk.tiers import Tiers

Result = TypeVar("Result")
Rows = Sequence[jax.Array]
Source = Callable[[range], Sequence[jax.Array | np.ndarray]]
"""The rows of a part of what is to be written, in RAM."""


class Device(Protocol):
    """What moves need of a replica; used on the driver's thread."""

    def read_pages(self, numbers: list[int]) -> Rows: ...
    def write_pages(self, numbers: list[int], rows: Rows) -> None: ...


class Mover:
    """Carries out the moves of one model, with caches of these shapes, between its device, ``host`` (the tier
    in RAM) and one on disk."""

    def __init__(
        self, device: Device, model: str, caches: Any, link: Link, host: RowTier, disk_pages: int
    ) -> None:
        self._device = device
        self._link = link
        self._host = host
        self._row = pages.row(caches)
        self._page_bytes = pages.page_bytes(caches)
        self._sizes = pages.sizes(caches)
        self._tiers = Tiers(model, self._page_bytes, host, disk_pages)
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="seal")

    def move(self, move: Move, key: bytes) -> PendingMove:
        sources, targets = [source for source, _ in move.pages], [target for _, target in move.pages]
        match move.source, move.target:
            case "device", "host":
                return self._out(
                    sources, lambda part, rows: self._keep(targets[part.start : part.stop], rows)
                )
            case "device", "disk":
                return self.save(sources, lambda i, data: self._tiers.disk.write(targets[i], data, key))
            case "host", "device":
                return self._in(targets, lambda part: [self._host.row(sources[index]) for index in part])
            case "disk", "device":
                return self.restore(targets, lambda i: self._tiers.disk.read(sources[i], key))
        return self._tiers.move(move, key)

    def close(self) -> None:
        """Give back the tiers; no move is under way."""
        self._pool.shutdown()
        self._host.close()
        self._tiers.close()

    def save(self, numbers: list[int], put: Put) -> PendingMove:
        """Read pages of the device; see ``Driver.save``."""

        def take(part: range, rows: Rows) -> None:
            self._each(part, lambda index: put(index, view(rows[index - part.start]).data))

        return self._out(numbers, take)

    def restore(self, numbers: list[int], get: Get) -> PendingMove:
        """Write pages of the device; see ``Driver.restore``."""
        return self._in(
            numbers, lambda part: self._each(part, lambda index: np.frombuffer(get(index), self._row.dtype))
        )

    def _keep(self, blocks: list[int], rows: Rows) -> None:
        for block, row in zip(blocks, rows, strict=True):
            self._host.keep(block, row)

    def _out(self, numbers: list[int], take: Callable[[range, Rows], None]) -> PendingMove:
        """Read pages; ``take`` gets the rows of each part of ``numbers`` when they are in RAM."""
        gathered = [
            (part, self._device.read_pages(numbers[part.start : part.stop])) for part in self._parts(numbers)
        ]

        def copy() -> Finish:
            jax.block_until_ready(gathered[0][1])  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            fetched = [(part, self._link.fetch(rows)) for part, rows in gathered]
            gathered.clear()
            while fetched:
                part, rows = fetched.pop(0)
                take(part, jax.block_until_ready(rows))  # type: ignore[no-untyped-call]
            return self._moved(numbers, began)

        return copy

    def _in(self, numbers: list[int], source: Source) -> PendingMove:
        """Write pages with what ``source`` has for each part of ``numbers``."""

        def copy() -> Finish:
            began = time.perf_counter()
            sent = [(part, self._link.send(source(part))) for part in self._parts(numbers)]
            jax.block_until_ready([rows for _, rows in sent])  # type: ignore[no-untyped-call]
            moved = self._moved(numbers, began)

            def finish() -> Moved:
                for part, rows in sent:
                    self._device.write_pages(numbers[part.start : part.stop], rows)
                return moved()

            return finish

        return copy

    def _parts(self, numbers: list[int]) -> Iterator[range]:
        at = 0
        for size in pages.parts(len(numbers), self._sizes):
            yield range(at, at + size)
            at += size

    def _each(self, part: range, act: Callable[[int], Result]) -> list[Result]:
        """Act for every place of a part, several at once: files and the cipher let other threads run."""
        acts = [self._pool.submit(act, index) for index in part]
        # All of them end before an error is raised: the rows and the file must outlive them.
        wait(acts)
        return [done.result() for done in acts]

    def _moved(self, numbers: list[int], began: float) -> Finish:
        moved = Moved(len(numbers) * self._page_bytes, round((time.perf_counter() - began) * 1e6))
        return lambda: moved


def open_movers(engines: list[Engine], loaded: LoadedModel) -> list[Mover]:
    """The mover of each replica of a model that was just loaded, each with tiers of its own; none where a
    replica is cut over several devices. NoMemory or IOFailure where a tier cannot be had."""
    movers = []
    for engine in engines:
        place, caches = engine.programs.spec.place, engine.programs.spec.caches
        if isinstance(place, OneDevice):
            link = Link(place.device)
            host = RowTier(link, pages.row(caches), loaded.host_pages)
            movers.append(Mover(engine.replica, loaded.model, caches, link, host, loaded.disk_pages))
    return movers

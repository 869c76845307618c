"""Loading and dropping the adapters of a model that runs: on all its replicas, between their steps."""

from __future__ import annotations

from pathlib import Path

import jax

from llmos.drivers.jax.adapters.adapters import Table
from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.weights import peft
from llmos.drivers.sdk.driver import FinishAdapter, PendingAdapter
from llmos.drivers.sdk.messages import LoadAdapter, LoadedAdapter
from llmos.ipc.errors import Busy


class Adapters:
    """Those of one model, of which as many as ``size`` can be loaded at once."""

    def __init__(self, engines: list[Engine], size: int) -> None:
        self._engines = engines
        self._table = Table(size)
        self._room = engines[0].programs.spec.room
        for engine in engines:
            engine.ledger.adapters = self._table.numbers

    def load(self, request: LoadAdapter) -> PendingAdapter:
        """Read an adapter and copy it to the devices on a worker thread, and the first time compile what
        steps with adapters need; then a program puts it in its place behind the steps that were dispatched
        before."""
        self._table.check_room(request.adapter)
        room = self._room

        def read() -> FinishAdapter:
            assert room is not None
            rank, pairs = peft.read(Path(request.source), room)
            size = sum(a.nbytes + b.nbytes for a, b in pairs)
            placed = [jax.block_until_ready(each.replica.place_adapter(pairs)) for each in self._engines]  # type: ignore[no-untyped-call]
            compiled = [each for each in self._engines if each.programs.compile_adapted()]

            def finish() -> LoadedAdapter:
                for engine in compiled:
                    engine.rehearse_later(engine.programs.spec.adapted())
                number = self._table.take(request.adapter)
                for engine, own in zip(self._engines, placed, strict=True):
                    engine.replica.adapt(number, own)
                return LoadedAdapter(adapter=request.adapter, rank=rank, bytes=size)

            return finish

        return read

    def unload(self, adapter: str) -> None:
        """Its place may be taken by another; Busy while a sequence has it."""
        number = self._table.number(adapter)
        users = [
            slot for each in self._engines for slot, it in each.ledger.slots.items() if it.adapter == number
        ]
        if users:
            raise Busy(f"adapter {adapter} is in use by {len(users)} sequences: wait until they end")
        self._table.drop(adapter)

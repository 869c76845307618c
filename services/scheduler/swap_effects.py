"""What ``swapping`` asks for, as messages: calls to memory, and moves that the driver makes in turn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llmos.drivers.sdk.messages import Move, Moved
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.services.memory.messages import (
    Batch,
    Costs,
    Demote,
    Reserved,
    Settle,
    Settled,
    SwapIn,
    SwapOut,
    Transfer,
)
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task

if TYPE_CHECKING:
    from llmos.services.scheduler.server import Scheduler

now = time.monotonic


class SwapMessages:
    """Implements ``swapping.SwapEffects``; the answers go back to the core as events."""

    _server: Scheduler

    def swap_out(self, host: Host, task: Task) -> None:
        residence, swapping = task.residence, self._server.core.swapping

        def answered(answer: Answer) -> None:
            if answer.error is not None:
                swapping.stays(host, task, residence, answer.error, now())
            else:
                swapping.going(host, task, residence, codec.decode(answer.body, Transfer))

        self._server.call("memory.swap_out", SwapOut(host.arena, task.id), answered)

    def swap_in(self, host: Host, task: Task, extra: int, spare: int) -> None:
        residence, swapping = task.residence, self._server.core.swapping

        def answered(answer: Answer) -> None:
            if answer.error is not None:
                swapping.must_wait(host, task, residence, answer.error, now())
                return
            body = codec.decode(answer.body, Reserved)
            swapping.coming(host, task, residence, body.pages, body.cached, body.transfer, now())
            swapping.relieve(host, body.low)

        hurry = host.tiers.hurries(task)
        body = SwapIn(host.arena, task.id, extra, spare, hurry, host.may_borrow)
        self._server.call("memory.swap_in", body, answered)

    def demote(self, host: Host) -> None:
        def answered(answer: Answer) -> None:
            if answer.error is None:
                self._server.core.swapping.demotion(host, codec.decode(answer.body, Transfer), now())
            else:
                host.tiers.demoting = False

        self._server.call("memory.demote", Demote(host.arena), answered)

    def transfer(self, host: Host, transfer: Transfer) -> None:
        """Move batch after batch, as far as it goes; then tell memory how far that was."""
        self._move(host, transfer, 0)

    def abort(self, host: Host, transfer: Transfer) -> None:
        if transfer.batches:
            self._server.cast("memory.settle", Settle(host.arena, transfer.id, 0))

    def teach(self, host: Host, costs: Costs) -> None:
        self._server.cast("memory.costs", costs)

    def _move(self, host: Host, transfer: Transfer, done: int) -> None:
        if done == len(transfer.batches):
            self._settle(host, transfer, done)
            return
        batch = transfer.batches[done]

        def answered(answer: Answer) -> None:
            if answer.error is not None:
                self._server.complain(f"{host.driver} moved no pages: {answer.error}")
                self._settle(host, transfer, done)
                return
            host.tiers.links.observe(batch, codec.decode(answer.body, Moved))
            self._move(host, transfer, done + 1)

        self._server.call(f"driver.{host.driver}.move", _move(host, batch), answered)

    def _settle(self, host: Host, transfer: Transfer, done: int) -> None:
        complete = done == len(transfer.batches)

        def answered(answer: Answer) -> None:
            known = answer.error is None
            body = codec.decode(answer.body, Settled) if known else Settled(0)
            self._server.core.swapping.settled(
                host, transfer.id, complete and known, body.cached, body.low, now()
            )

        self._server.call("memory.settle", Settle(host.arena, transfer.id, done), answered)


def _move(host: Host, batch: Batch) -> Move:
    return Move(
        model=host.model.model,
        source=batch.source,
        target=batch.target,
        pages=batch.pages,
        tenant=batch.tenant,
        replica=host.replica,
    )

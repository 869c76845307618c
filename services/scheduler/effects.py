"""The core's effects as messages: calls to memory and the drivers, answers to those who submitted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmos.drivers.sdk.messages import Cut, Preempt, Quantum, QuantumDone, Step
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Busy, HostDown, IOFailure, LLMOSError, NoMemory, NotFound
from llmos.ipc.header import Kind
from llmos.ipc.server import Incoming
from llmos.services.memory.messages import (
    Arena,
    Commit,
    Free,
    Grow,
    Grown,
    Holding,
    Reserve,
    Reserved,
    Restore,
)
from llmos.services.scheduler import saving
from llmos.services.scheduler.host import Host, Produced
from llmos.services.scheduler.lasting import Room
from llmos.services.scheduler.lending import Debts
from llmos.services.scheduler.limits import RateLimits
from llmos.services.scheduler.messages import Emitted, Finished, Reason, Tokens
from llmos.services.scheduler.swap_effects import SwapMessages
from llmos.services.scheduler.task import Place, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core
    from llmos.services.scheduler.server import Scheduler

RETRY_SECONDS = 0.05
PREEMPT_SECONDS = 5.0  # a driver that has not said by then how far it came will not
now = time.monotonic


class MessageEffects(SwapMessages):
    """Implements ``core.Effects``; the answers of memory and drivers go back to the core as events."""

    def __init__(self, server: Scheduler, attached: dict[int, Incoming], rates: RateLimits) -> None:
        self._server = server
        self._rates = rates
        self._attached = attached
        # Resumed tasks whose pages are being read from their files, with what they asked for meanwhile.
        self._filling: dict[int, Callable[[], None] | None] = {}

    def reserve(self, host: Host, task: Task, extra: int, room: Room) -> None:
        def answered(answer: Answer) -> None:
            if answer.error is None:
                body = codec.decode(answer.body, Reserved)
                if task.resume is not None and body.transfer is None:
                    self._resume(host, task, body)
                    return
                # What is in another tier is nearer than the file.
                task.resume = None
                self._server.core.paging.reserved(
                    host, task, body.pages, body.cached, now(), body.transfer, body.low
                )
            elif isinstance(answer.error, NoMemory):
                self._server.core.paging.refused(host, task, now(), answer.error)
            elif isinstance(answer.error, HostDown | Busy | NotFound):
                # A memory that has just died has a full queue, one that was just started no arenas yet.
                self._server.after(RETRY_SECONDS, again)
            else:
                self._server.core.kill(task, answer.error, now())

        def again() -> None:
            if self._server.core.hosts.get(host.arena) is host:
                self.reserve(host, task, extra, room)

        if task.id in self._filling:
            self._filling[task.id] = lambda: self.reserve(host, task, extra, room)
        elif task.place is Place.RESERVING:
            hurry, borrow = host.tiers.hurries(task), host.may_borrow
            body = Reserve(host.arena, task.id, task.tokens, extra, hurry, task.adapter, borrow, *room)
            self._server.call("memory.reserve", body, answered, acting=task.call)

    def _resume(self, host: Host, task: Task, body: Reserved) -> None:
        """Tell the core of a resumed task's pages once they hold what its file has."""
        self._filling[task.id] = None

        def given(pages: list[int], cached: int) -> None:
            again = self._filling.pop(task.id)
            if again is None:
                self._server.core.paging.reserved(host, task, pages, cached, now())
            else:
                # It left meanwhile, and came back, perhaps to another host.
                self.free(host, [task])
                again()

        saving.fill(self._server, host, task, body.pages, body.cached, given)

    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None:
        asked = {task.id: (task, task.residence) for task, _ in wants}

        def answered(answer: Answer) -> None:
            if answer.error is not None:
                # Memory is being started anew; ask again when it may be back.
                for task, _ in wants:
                    task.growing = False
                self._server.after(RETRY_SECONDS, lambda: self._server.core.paging.grown(host, [], now()))
                return
            body = codec.decode(answer.body, Grown)
            gets = [(*asked[id], pages) for id, pages in body.gets]
            debts = Debts(body.owed, body.lenders)
            self._server.core.paging.grown(host, gets, now(), body.low, debts)

        self._server.call(
            "memory.grow",
            Grow(host.arena, [(task.id, pages) for task, pages in wants], host.may_borrow),
            answered,
        )

    def free(self, host: Host, tasks: list[Task]) -> None:
        self._server.cast("memory.free", Free(host.arena, [task.id for task in tasks]))

    def commit(self, host: Host, tasks: list[Task]) -> None:
        lines = [(task.id, task.tokens[task.committed :], task.computed) for task in tasks]
        for task in tasks:
            task.committed = len(task.tokens)
        self._server.cast("memory.commit", Commit(host.arena, lines))

    def wake(self, seconds: float) -> None:
        self._server.after(seconds, lambda: self._server.core.lending.wake(now()))

    def execute(self, host: Host, quantum: Quantum) -> None:
        def answered(answer: Answer) -> None:
            if self._server.core.hosts.get(host.arena) is not host:
                return
            if answer.error is not None:
                self._server.quantum_failed(host, answer.error)
            elif answer.kind == Kind.CHUNK:
                self._server.core.step(host, codec.decode(answer.body, Step), now())
            else:
                self._server.core.done(host, codec.decode(answer.body, QuantumDone), now())

        self._server.call(f"driver.{host.driver}.execute", quantum, answered)

    def preempt(self, host: Host, quantum: int) -> None:
        def answered(answer: Answer) -> None:
            # Where it failed, or nothing is said, the quanta themselves say how far they came.
            if answer.error is not None or answer.body == codec.EMPTY:
                return
            if self._server.core.hosts.get(host.arena) is host:
                self._server.core.cut(host, dict(codec.decode(answer.body, Cut).quanta), now())

        target = f"driver.{host.driver}.preempt"
        self._server.call(target, Preempt(quantum), answered, timeout=PREEMPT_SECONDS)

    def emit(self, produced: list[Produced]) -> None:
        streams: dict[int, list[Tokens]] = {}
        for item in produced:
            call: Incoming = item.task.call
            tokens = Tokens(call.head.id, item.task.produced - len(item.tokens), item.tokens)
            if call.origin.connection in self._attached:
                streams.setdefault(call.origin.connection, []).append(tokens)
            else:
                call.chunk(tokens)
        for connection, batch in streams.items():
            self._attached[connection].chunk(Emitted(batch))

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        call: Incoming = task.call
        call.on_cancel = None  # it leads back to the task: nobody has to look for that cycle
        # Who never had a slot took nothing.
        self._rates.give_back(task.tenant, task.limit - (len(task.tokens) if task.started_at else 0))
        self._server.parking.used(task.model, now())
        if error is not None or reason is None:
            call.fail(error or IOFailure("the task ended without a reason"))
            return
        ended = now()
        call.end(
            Finished(
                task=task.id,
                reason=reason,
                prompt_tokens=task.prompt,
                cached_tokens=max(0, task.first_cached),
                completion_tokens=task.produced,
                queued=task.started_at - task.arrived,
                first_token=task.first_token_at - task.arrived,
                total=ended - task.arrived,
            )
        )


def holdings(core: Core, host: Host) -> Restore:
    """What is held in a host's arena, for a memory that was started anew."""
    held = [
        Holding(task.id, task.tenant, task.pages, task.tokens, task.computed, task.max_pages, task.adapter)
        for task in core.tasks.values()
        if task.pages and task.arena == host.arena
    ]
    # What a transfer writes must not be handed to others meanwhile; of its content memory knows nothing.
    taken = {page for holding in held for page in holding.pages}
    for task, pages in core.swapping.pages_on_their_way(host):
        mine = [page for page in pages if page not in taken]
        held.append(Holding(task.id, task.tenant, mine, task.tokens, 0, task.max_pages))
        taken.update(mine)
    return Restore(arena=arena_of(host), tasks=held)


def arena_of(host: Host) -> Arena:
    """A host's arena as memory wants it declared."""
    model = host.model
    return Arena(
        arena=host.arena,
        pages=model.pages,
        page_tokens=model.page_tokens,
        page_bytes=model.page_bytes,
        host_pages=model.host_pages,
        disk_pages=model.disk_pages,
        pool=host.pool,
        slabs=model.slabs,
        slab_pages=model.slab_pages,
        slab_bytes=model.slab_bytes,
    )

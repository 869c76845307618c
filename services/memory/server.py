"""The message handlers of memory."""

from __future__ import annotations

import logging
from typing import ClassVar

from llmos.ipc.errors import LLMOSError
from llmos.ipc.server import Incoming, Server, method
from llmos.services.memory import arena as policy
from llmos.services.memory.arenas import Arenas
from llmos.services.memory.messages import (
    Arena,
    Commit,
    Costs,
    Demote,
    DropArena,
    Free,
    Grow,
    Grown,
    Reserve,
    Reserved,
    Restore,
    Settle,
    Settled,
    SwapIn,
    SwapOut,
    Transfer,
    Usage,
)

log = logging.getLogger("llmos.memory")


class MemoryServer(Server):
    """Keeps the accounts of each arena that was declared."""

    name: ClassVar[str] = "memory"
    watch: ClassVar[bool] = True

    def start(self) -> None:
        self.arenas = Arenas()

    def on_down(self, name: str, connection: int) -> None:
        """Without its scheduler no task goes on: what they computed stays as cache."""
        if name == "scheduler":
            for one in self.arenas:
                one.free(list(one.tasks))
                one.tiers.abandon()

    @method
    def arena(self, request: Arena, call: Incoming) -> None:
        self.arenas.declare(request)
        log.info("arena %s: %d pages of %d tokens", request.arena, request.pages, request.page_tokens)

    @method
    def drop_arena(self, request: DropArena, call: Incoming) -> None:
        self.arenas.drop(request.arena)

    @method
    def restore(self, request: Restore, call: Incoming) -> None:
        self.arenas.restore(request)
        log.info("arena %s: restored with %d tasks", request.arena.arena, len(request.tasks))

    @method
    def reserve(self, request: Reserve, call: Incoming) -> Reserved:
        grant = call.origin.grant
        arena = self.arenas[request.arena]
        arena.reserve(
            request.task,
            grant.tenant,
            request.tokens,
            request.extra,
            grant.max_pages,
            request.hurry,
            request.adapter,
            request.borrow,
            request.spare,
            request.around,
        )
        return _reserved(arena, request.task)

    @method
    def grow(self, request: Grow, call: Incoming) -> Grown:
        arena = self.arenas[request.arena]
        gets = arena.grow(request.wants, request.borrow)
        short = any(want and not pages for (_, want), (_, pages) in zip(request.wants, gets, strict=True))
        owed, lenders = arena.pool.debts() if short else (0, {})
        return Grown(gets, arena.tiers.low, owed, lenders)

    @method
    def swap_out(self, request: SwapOut, call: Incoming) -> Transfer:
        return self.arenas[request.arena].tiers.swap_out(request.task).message()

    @method
    def swap_in(self, request: SwapIn, call: Incoming) -> Reserved:
        arena = self.arenas[request.arena]
        arena.tiers.swap_in(request.task, request.extra, request.spare, request.hurry, request.borrow)
        return _reserved(arena, request.task)

    @method
    def demote(self, request: Demote, call: Incoming) -> Transfer:
        transfer = self.arenas[request.arena].tiers.demote()
        return transfer.message() if transfer else Transfer(0, [])

    @method
    def settle(self, request: Settle, call: Incoming) -> Settled:
        arena = self.arenas[request.arena]
        task = arena.tiers.settle(request.transfer, request.done)
        return Settled(task.computed if task else 0, arena.tiers.low)

    @method
    def costs(self, request: Costs, call: Incoming) -> None:
        self.arenas[request.arena].tiers.learn(request)

    @method
    def commit(self, request: Commit, call: Incoming) -> None:
        try:
            self.arenas[request.arena].commit(request.tasks)
        except LLMOSError as error:
            # The scheduler casts its commits, so it would never learn of this.
            log.warning("a commit of %d tasks was refused: %s", len(request.tasks), error)
            raise

    @method
    def free(self, request: Free, call: Incoming) -> None:
        self.arenas[request.arena].free(request.tasks)

    @method
    def usage(self, request: None, call: Incoming) -> Usage:
        return Usage([one.usage() for one in self.arenas], self.arenas.pools())


def _reserved(arena: policy.Arena, id: int) -> Reserved:
    task = arena.tasks[id]
    transfer = task.transfer.message() if task.transfer else None
    return Reserved(task.pages, task.computed, transfer, arena.tiers.low)

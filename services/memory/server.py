"""The message handlers of memory."""

from __future__ import annotations

import logging
from typing import ClassVar

from llmos.ipc.errors import LLMOSError, NotFound
from llmos.ipc.server import Incoming, Server, method
from llmos.services.memory import arena as policy
from llmos.services.memory.messages import (
    Arena,
    Commit,
    DropArena,
    Free,
    Grow,
    Grown,
    Reserve,
    Reserved,
    Restore,
    Usage,
)

log = logging.getLogger("llmos.memory")


class MemoryServer(Server):
    """Keeps an ``policy.Arena`` for each arena that was declared."""

    name: ClassVar[str] = "memory"
    watch: ClassVar[bool] = True

    def start(self) -> None:
        self.arenas: dict[str, policy.Arena] = {}

    def on_down(self, name: str, connection: int) -> None:
        """Without its scheduler no task goes on: what they computed stays as cache."""
        if name == "scheduler":
            for one in self.arenas.values():
                one.free(list(one.tasks))

    @method
    def arena(self, request: Arena, call: Incoming) -> None:
        self.arenas[request.arena] = policy.Arena(request)
        log.info("arena %s: %d pages of %d tokens", request.arena, request.pages, request.page_tokens)

    @method
    def drop_arena(self, request: DropArena, call: Incoming) -> None:
        if self.arenas.pop(request.arena, None) is None:
            raise NotFound(f"there is no arena {request.arena!r}")

    @method
    def restore(self, request: Restore, call: Incoming) -> None:
        self.arenas[request.arena.arena] = policy.restore(request)
        log.info("arena %s: restored with %d tasks", request.arena.arena, len(request.tasks))

    @method
    def reserve(self, request: Reserve, call: Incoming) -> Reserved:
        grant = call.origin.grant
        pages, cached = self._arena(request.arena).reserve(
            request.task, grant.tenant, request.tokens, request.extra, grant.max_pages
        )
        return Reserved(pages, cached)

    @method
    def grow(self, request: Grow, call: Incoming) -> Grown:
        return Grown(self._arena(request.arena).grow(request.wants))

    @method
    def commit(self, request: Commit, call: Incoming) -> None:
        try:
            self._arena(request.arena).commit(request.tasks)
        except LLMOSError as error:
            # The scheduler casts its commits, so it would never learn of this.
            log.warning("a commit of %d tasks was refused: %s", len(request.tasks), error)
            raise

    @method
    def free(self, request: Free, call: Incoming) -> None:
        self._arena(request.arena).free(request.tasks)

    @method
    def usage(self, request: None, call: Incoming) -> Usage:
        return Usage([one.usage() for one in self.arenas.values()])

    def _arena(self, name: str) -> policy.Arena:
        found = self.arenas.get(name)
        if found is None:
            raise NotFound(f"there is no arena {name!r}: declare it first")
        return found

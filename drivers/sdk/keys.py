"""The keys that seal a tenant's data outside RAM: asked for once, kept in memory, never written or logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import LLMOSError
from llmos.ipc.server import Incoming, Server
from llmos.services.security.messages import StorageKey, StorageKeyQuery

Purpose = Literal["pages", "tasks"]

KEY_SECONDS = 10.0


class StorageKeys:
    """The keys that this process was given by security."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: dict[tuple[str, Purpose], bytes] = {}

    def use(self, tenant: str, purpose: Purpose, call: Incoming, act: Callable[[bytes], None]) -> None:
        """Act with a tenant's key, at once where it is known; a refusal, or what acting raises, fails the
        call."""
        known = self._known.get((tenant, purpose))
        if known is not None:
            act(known)
            return

        def answered(answer: Answer) -> None:
            if answer.error is not None:
                call.fail(answer.error)
                return
            key = self._known[tenant, purpose] = codec.decode(answer.body, StorageKey).key
            try:
                act(key)
            except LLMOSError as error:
                call.fail(error)

        query = StorageKeyQuery(tenant, purpose)
        self._server.call("security.storage_key", query, answered, timeout=KEY_SECONDS)

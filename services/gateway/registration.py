"""How an asyncio process is a service: ready, beats and stop on the control connection.

The twin of the control side of ``llmos.ipc.server.Server``; the data connection is an ``AsyncClient`` under
the same token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.aio import AsyncClient
from llmos.ipc.errors import LLMOSError
from llmos.ipc.header import Header, Kind
from llmos.ipc.link import now
from llmos.ipc.server import BEAT_SECONDS
from llmos.ipc.session import Session
from llmos.kernel.messages import Beat

READY_SECONDS = 30.0


class Registration:
    """Keeps a name at the kernel, under its successors, too, until told to stop."""

    def __init__(
        self,
        token: str,
        client: AsyncClient,
        run: Path,
        *,
        on_stop: Callable[[], None],
        progress: Callable[[], int],
    ) -> None:
        self._client = client
        self._control = Session(paths.socket_address("control", run), token, control=True)
        self._control.on_message = self._on_message
        self._on_stop = on_stop
        self._progress = progress
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Say that this service is ready, and go on to say how it is."""
        self._control.open()
        self._beating = asyncio.ensure_future(self._beat())

    async def close(self) -> None:
        """Give the name back."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        self._control.close()

    async def _beat(self) -> None:
        told = -1
        while True:
            try:
                deadline = now() + int(READY_SECONDS * 1e6)
                await self._control.ready(deadline)
                await self._client.session.ready(deadline)
                session = self._control.number
                if told != session:
                    await self._control.verb("ready", None, deadline)
                    told = session
                self._control.send("beat", Beat(self._progress()))
            except LLMOSError:
                # The kernel is being restarted; its successor is told everything again.
                told = -1
            await asyncio.sleep(BEAT_SECONDS)

    def _on_message(self, head: Header, frames: list[bytes]) -> None:
        if head.kind == Kind.KERNEL and head.method == "stop":
            self._on_stop()

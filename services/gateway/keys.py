"""API keys: each is a capability token, presented to the kernel once and used by its handle after that."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress

from llmos.ipc import limits
from llmos.ipc.aio import AsyncClient
from llmos.ipc.errors import AccessDenied, InvalidArgument, LLMOSError, ProtocolError
from llmos.services.gateway.errors import ApiError, unauthorized

CAPACITY = 1024
BEARER = "bearer "


def read_key(header: str | None) -> str:
    """The key in an Authorization header; ApiError 401 if there is none."""
    if header is None or not header[: len(BEARER)].lower() == BEARER or not header[len(BEARER) :].strip():
        raise unauthorized("no API key: send it as the header Authorization: Bearer KEY")
    key = header[len(BEARER) :].strip()
    if len(key) > limits.TOKEN_BYTES:
        raise unauthorized(f"an API key of {len(key)} characters is none")
    return key


class KeyRing:
    """The handles of the keys used last; the one unused for longest gives way."""

    def __init__(self, client: AsyncClient, capacity: int = CAPACITY) -> None:
        self._client = client
        self._capacity = capacity
        self._handles: OrderedDict[str, asyncio.Task[int]] = OrderedDict()
        self._releases: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._handles)

    async def handle(self, key: str) -> int:
        """The handle for a key; ApiError 401 if the kernel does not take it."""
        task = self._handles.get(key)
        if task is None:
            # One for all who ask at the same time; it goes on when the first of them leaves.
            task = self._handles[key] = asyncio.ensure_future(self._client.present(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._handles.move_to_end(key)
        try:
            handle = await asyncio.shield(task)
        except (AccessDenied, InvalidArgument, ProtocolError) as error:
            self._forget(key, task)
            raise unauthorized(f"the API key is not valid: {error.message}") from None
        except LLMOSError:
            self._forget(key, task)
            raise
        while len(self._handles) > self._capacity:
            self.drop(next(iter(self._handles)))
        return handle

    def drop(self, key: str) -> None:
        """Forget a key and give its handle back."""
        task = self._handles.pop(key, None)
        if task is not None:
            release = asyncio.ensure_future(self._release(task))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def denied(self, key: str, error: AccessDenied) -> ApiError | None:
        """Whether a refusal is the key's fault: the 401 if it is no longer valid, None if it is."""
        self.drop(key)
        try:
            await self.handle(key)
        except ApiError as refused:
            return refused
        except LLMOSError:
            return None
        return None

    def _forget(self, key: str, task: asyncio.Task[int]) -> None:
        if self._handles.get(key) is task:
            del self._handles[key]

    async def _release(self, task: asyncio.Task[int]) -> None:
        with suppress(LLMOSError):
            await self._client.release(await task)

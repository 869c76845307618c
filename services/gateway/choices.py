"""The streams behind one request: one for each choice, read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from llmos.ipc.aio import AsyncClient
from llmos.ipc.errors import LLMOSError
from llmos.services.models.messages import Chat, Complete, Done, Text

Item = Text | Done
Batch = list[tuple[int, Item]]


async def run(
    client: AsyncClient, method: str, bodies: Sequence[Chat | Complete], *, handle: int, timeout: float
) -> AsyncGenerator[Batch, None]:
    """What all choices say, in batches of (choice, text or end), each as soon as it is there.

    Leaving early, or an error of any choice, withdraws all of them.
    """
    if len(bodies) == 1:
        async with client.stream(method, bodies[0], Text, Done, handle=handle, timeout=timeout) as stream:
            while items := await stream.batch():
                yield [(0, item) for item in items]
        return
    queue: asyncio.Queue[Batch | LLMOSError | None] = asyncio.Queue()

    async def read(choice: int, body: Chat | Complete) -> None:
        try:
            async with client.stream(method, body, Text, Done, handle=handle, timeout=timeout) as stream:
                while items := await stream.batch():
                    queue.put_nowait([(choice, item) for item in items])
            queue.put_nowait(None)
        except LLMOSError as error:
            queue.put_nowait(error)

    readers = [asyncio.ensure_future(read(choice, body)) for choice, body in enumerate(bodies)]
    try:
        left = len(readers)
        while left:
            batch = await queue.get()
            if isinstance(batch, LLMOSError):
                raise batch
            if batch is None:
                left -= 1
            else:
                yield batch
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) with increasing ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from llmos.ipc.errors import LLMOSError
from llmos.services.gateway.choices import Batch
from llmos.services.gateway.errors import from_error
from llmos.services.gateway.replies import Shape
from llmos.services.models.messages import Done, Text


class Events:
    """Numbers and frames the data of one stream."""

    def __init__(self) -> None:
        self._id = 0

    def frame(self, data: bytes) -> bytes:
        self._id += 1
        return b"id: %d\ndata: %b\n\n" % (self._id, data)


async def events(
    shape: Shape, count: int, first: Batch, rest: AsyncGenerator[Batch, None]
) -> AsyncGenerator[bytes, None]:
    """All that a stream of ``count`` choices sends; an error in its middle is sent as an event, too."""
    out, ends = Events(), dict[int, Done]()
    opening = [data for index in range(count) if (data := shape.first(index)) is not None]
    async with aclosing(rest):
        yield b"".join(map(out.frame, opening + _pieces(shape, first, ends)))
        try:
            async for batch in rest:
                yield b"".join(map(out.frame, _pieces(shape, batch, ends)))
        except LLMOSError as error:
            yield out.frame(msgspec.json.encode(from_error(error).body))
            return
    if shape.include_usage:
        yield out.frame(shape.totals([ends[index] for index in range(count)]))
    yield out.frame(b"[DONE]")


def _pieces(shape: Shape, batch: Batch, ends: dict[int, Done]) -> list[bytes]:
    pieces = []
    for index, item in batch:
        if isinstance(item, Text):
            pieces.append(shape.piece(index, item))
        else:
            ends[index] = item
            pieces.append(shape.last(index, item))
    return pieces

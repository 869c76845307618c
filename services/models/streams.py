"""The answers under way: tasks submitted to the scheduler, their tokens read, their text sent.

The scheduler sends what one step produced for all our tasks as one message on the ``attach`` stream; each
task's end comes as the answer to its own ``submit``, after its last tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from llmos.ipc import calls, codec
from llmos.ipc.calls import FINAL
from llmos.ipc.errors import IOFailure
from llmos.ipc.header import Kind
from llmos.ipc.server import Incoming, Server
from llmos.services.models.generation import Answer
from llmos.services.models.messages import Text
from llmos.services.scheduler.messages import Emitted, Finished, Submit, Tokens

log = logging.getLogger("llmos.models")


class _Running:
    """One client's call and the answer being generated for it."""

    __slots__ = ("answer", "call", "stream")

    def __init__(self, call: Incoming, answer: Answer, stream: bool) -> None:
        self.call = call
        self.answer = answer
        self.stream = stream


class Streams:
    """All answers under way, by the message id of their submit."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._running: dict[int, _Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def attach(self) -> None:
        """Open the stream of tokens; once for each life of the scheduler."""
        self._server.call("scheduler.attach", None, self._on_attached)

    def begin(self, call: Incoming, submit: Submit, answer: Answer, *, stream: bool) -> None:
        """Submit a task under the rights of the call, and answer the call with what it produces."""
        listener, bind = self._listener()
        id = self._server.call("scheduler.submit", submit, listener, acting=call)
        bind(id)
        self._running[id] = _Running(call, answer, stream)
        call.on_cancel = lambda: self._withdraw(id)

    def _listener(self) -> tuple[calls.Listener, Callable[[int], None]]:
        """A listener that knows the id of its call, which there is only once the call is made."""
        ids: list[int] = []
        return lambda answer: self._on_submitted(ids[0], answer), ids.append

    def _withdraw(self, id: int) -> None:
        if self._running.pop(id, None) is not None:
            self._server.data.cancel(id)

    def _on_attached(self, answer: calls.Answer) -> None:
        if answer.kind == Kind.CHUNK:
            for tokens in codec.decode(answer.body, Emitted).tokens:
                self._on_tokens(tokens)
        elif answer.error is not None and answer.error.code != "EHOSTDOWN":
            # Tokens in between are lost; their answers notice it by the offset.
            log.warning("the stream of tokens broke: %s", answer.error)
            self._server.after(0.1, self.attach)

    def _on_tokens(self, tokens: Tokens) -> None:
        running = self._running.get(tokens.call)
        if running is None:
            return
        try:
            text = running.answer.feed(tokens.offset, tokens.tokens, time.monotonic())
        except IOFailure as error:
            self._withdraw(tokens.call)
            running.call.fail(error)
            return
        self._say(running, text)
        if running.answer.stopped:
            self._withdraw(tokens.call)
            running.call.end(running.answer.cut(time.monotonic()))

    def _on_submitted(self, id: int, answer: calls.Answer) -> None:
        if answer.kind == Kind.CHUNK:
            self._on_tokens(codec.decode(answer.body, Tokens))
            return
        running = self._running.pop(id, None) if answer.kind in FINAL else None
        if running is None:
            return
        if answer.error is not None:
            running.call.fail(answer.error)
        else:
            self._finish(running, codec.decode(answer.body, Finished))

    def _finish(self, running: _Running, finished: Finished) -> None:
        self._say(running, running.answer.finish())
        running.call.end(running.answer.done(finished))

    def _say(self, running: _Running, text: Text | None) -> None:
        if text is not None and running.stream:
            running.call.chunk(text)

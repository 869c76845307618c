"""The synchronous client: calls, streams, cancellation, deadlines. One thread at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import zmq

from llmos.ipc import codec, header, paths
from llmos.ipc.calls import FINAL, Answer
from llmos.ipc.errors import AccessDenied, HostDown, LLMOSError
from llmos.ipc.grant import Grant
from llmos.ipc.link import Link, now
from llmos.ipc.sockets import CurveClient, to_bytes
from llmos.kernel.messages import Present, Presented, Release

T = TypeVar("T")

DEFAULT_TIMEOUT = 60.0
RETRY_MS = 50
GRACE_MS = 100
BATCH = 256


class Client:
    """A connection to the kernel, under one token.

    ``token`` defaults to the local user's. ``address`` is the kernel's data socket in the run folder unless
    a tcp address is given, with ``curve`` keys. A call that never reached its service, because that is just
    being restarted, is repeated until its deadline. Raises AccessDenied for a bad token, HostDown where no
    kernel answers within ``timeout`` seconds.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        address: str | None = None,
        curve: CurveClient | None = None,
        run: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        token = token if token is not None else paths.read_token("user", run)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = Link(self._context, address or paths.socket_address("kernel", run), token, curve=curve)
        self._timeout = timeout
        try:
            welcome = self._link.hello(timeout)
        except LLMOSError:
            self.close()
            raise
        self.connection = welcome.connection
        self.grant: Grant = welcome.grant

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the kernel forgets this connection's capabilities and cancels its calls."""
        self._link.close()
        self._context.term()

    @overload
    def call(
        self,
        target: str,
        body: object = None,
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> Any: ...
    @overload
    def call(
        self,
        target: str,
        body: object,
        type: type[T],
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> T: ...
    def call(
        self,
        target: str,
        body: object = None,
        type: Any = None,
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> Any:
        """Call ``target`` ("service.method") and wait for its reply; raises the error it answers with."""
        *_, last = self.stream(target, body, None, type, timeout=timeout, handle=handle, trace=trace)
        return last

    def stream(
        self,
        target: str,
        body: object = None,
        type: Any = None,
        end: Any = None,
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> Generator[Any, None, None]:
        """Call and yield each chunk as it comes, then the body of the end; leaving the loop early cancels.

        ``type`` is the type of the chunks, ``end`` of the end; without one they are plain values.
        ``timeout`` in seconds bounds the whole call (default: the client's).
        """
        deadline = now() + int((self._timeout if timeout is None else timeout) * 1e6)
        frame = codec.encode(body)
        while True:
            try:
                yield from self._stream(target, frame, (type, end), deadline, handle, trace)
                return
            except (HostDown, AccessDenied) as error:
                if error.details.get("delivered", True) or now() + RETRY_MS * 1000 > deadline:
                    raise
                self._link.socket.poll(RETRY_MS)
                if isinstance(error, AccessDenied):
                    self._link.hello(max(0.0, (deadline - now()) / 1e6))

    def present(self, token: str) -> int:
        """Exchange a token for a handle, to make calls under another capability."""
        return codec.decode(self._verb("present", Present(token)), Presented).handle

    def release(self, handle: int) -> None:
        """Give a handle back."""
        self._verb("release", Release(handle))

    def _stream(
        self, target: str, frame: bytes, types: tuple[Any, Any], deadline: int, handle: int, trace: int
    ) -> Generator[Any, None, None]:
        if self._link.lost():
            self._link.hello(max(0.0, (deadline - now()) / 1e6))
        answers: deque[Answer] = deque()
        id = self._link.call(target, frame, deadline, answers.append, handle=handle, trace=trace)
        ended = False
        try:
            while not ended:
                self._receive(answers, deadline)
                while answers and not ended:
                    answer = answers.popleft()
                    ended = answer.kind in FINAL
                    yield _value(answer, types[ended])
        finally:
            if not ended:
                self._link.cancel(id)

    def _verb(self, method: str, body: object) -> bytes:
        answers: deque[Answer] = deque()
        deadline = now() + int(self._timeout * 1e6)
        self._link.verb(method, body, deadline, answers.append)
        while not answers:
            self._receive(answers, deadline)
        answer = answers.popleft()
        if answer.error is not None:
            raise answer.error
        return answer.body

    def _receive(self, answers: deque[Answer], deadline: int) -> None:
        """Wait for messages until there is an answer in ``answers``; expires calls past their deadline."""
        link = self._link
        poller = zmq.Poller()
        poller.register(link.socket, zmq.POLLIN)
        poller.register(link.monitor, zmq.POLLIN)
        while not answers:
            # A little past the deadline, so that the kernel's own word on it arrives first.
            if not poller.poll(max(0, (deadline - now()) // 1000) + GRACE_MS):
                link.calls.expire(now())
                continue
            for message in link.wire.drain(BATCH):
                frames = to_bytes(message)
                link.deliver(header.decode(frames[0]), frames)
            if link.lost():
                link.hello(max(0.0, (deadline - now()) / 1e6))


def _value(answer: Answer, type: Any) -> Any:
    if answer.error is not None:
        raise answer.error
    return codec.decode(answer.body, type) if type is not None else codec.decode_any(answer.body)

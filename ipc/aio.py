"""The asyncio client: calls, streams, cancellation, deadlines; belongs to the loop it was connected on."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from llmos.ipc import codec, header, paths
from llmos.ipc.calls import FINAL, Answer
from llmos.ipc.errors import AccessDenied, Busy, HostDown, LLMOSError, NotSupported
from llmos.ipc.grant import Grant, decode_origin
from llmos.ipc.header import VERSION, Header, Kind
from llmos.ipc.link import now
from llmos.ipc.session import RETRY_SECONDS, Session
from llmos.ipc.sockets import CurveClient
from llmos.kernel.messages import Present, Presented, Release

T = TypeVar("T")

DEFAULT_TIMEOUT = 60.0


class _Capability:
    """A token that was presented, and the kernel's handle for it in one session."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.session = -1
        self.handle = 0
        self.grant: Grant | None = None
        self.lock = asyncio.Lock()


class AsyncClient:
    """A connection to the kernel, under one token; the asyncio twin of ``llmos.ipc.client.Client``.

    Use as ``async with AsyncClient() as client``. A handle from ``present`` stays good when the kernel is
    started anew: its token is then presented again before the next call that uses it. Raises AccessDenied
    for a bad token, HostDown where no kernel answers within ``timeout`` seconds.
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
        self.session = Session(address or paths.socket_address("kernel", run), token, curve=curve)
        self.session.on_message = self._on_message
        self._timeout = timeout
        self._handles = itertools.count(1)
        self._capabilities: dict[int, _Capability] = {}

    async def connect(self) -> AsyncClient:
        """Connect on the running event loop."""
        self.session.open()
        try:
            await self.session.ready(self._deadline(None))
        except LLMOSError:
            self.close()
            raise
        return self

    async def __aenter__(self) -> AsyncClient:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the kernel forgets this connection's capabilities and cancels its calls."""
        self.session.close()

    def grant(self, handle: int = 0) -> Grant:
        """The rights behind a handle; 0 is the token that this client was made with."""
        welcome = self.session.welcome
        grant = self._capability(handle).grant if handle else welcome.grant if welcome else None
        if grant is None:
            raise HostDown("not connected yet")
        return grant

    @overload
    async def call(
        self,
        target: str,
        body: object = None,
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> Any: ...
    @overload
    async def call(
        self,
        target: str,
        body: object,
        type: type[T],
        *,
        timeout: float | None = None,
        handle: int = 0,
        trace: int = 0,
    ) -> T: ...
    async def call(
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
        last = None
        async with self.stream(
            target, body, None, type, timeout=timeout, handle=handle, trace=trace
        ) as answers:
            async for answer in answers:
                last = answer
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
    ) -> Stream:
        """Call, to iterate over each chunk as it comes, then the body of the end; leaving early cancels.

        ``type`` is the type of the chunks and ``end`` that of the end; without one they are plain values.
        ``timeout`` in seconds bounds the whole call (default: the client's).
        """
        return Stream(self, target, codec.encode(body), (type, end), self._deadline(timeout), handle, trace)

    async def present(self, token: str) -> int:
        """Exchange a token for a handle, to make calls under another capability."""
        handle, capability = next(self._handles), _Capability(token)
        await self._present(capability, self._deadline(None))
        self._capabilities[handle] = capability
        return handle

    async def release(self, handle: int) -> None:
        """Give a handle back."""
        capability = self._capability(handle)
        del self._capabilities[handle]
        if capability.session == self.session.number:
            await self.session.verb("release", Release(capability.handle), self._deadline(None))

    async def resolve(self, handle: int, deadline: int) -> int:
        """The kernel's handle for one of ours, in the session of this moment."""
        if handle == 0:
            await self.session.ready(deadline)
            return 0
        capability = self._capability(handle)
        await self._present(capability, deadline)
        return capability.handle

    def _capability(self, handle: int) -> _Capability:
        capability = self._capabilities.get(handle)
        if capability is None:
            raise AccessDenied(f"this client holds no capability {handle}")
        return capability

    async def _present(self, capability: _Capability, deadline: int) -> None:
        """Present a token, unless it was in this session."""
        while capability.session != self.session.number or not self.session.welcomed:
            async with capability.lock:
                await self.session.ready(deadline)
                session = self.session.number
                if capability.session == session:
                    return
                try:
                    body = await self.session.verb("present", Present(capability.token), deadline)
                except LLMOSError as error:
                    if error.details.get("delivered", True) or now() > deadline:
                        raise
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                presented = codec.decode(body, Presented)
                capability.handle, capability.grant = presented.handle, presented.grant
                capability.session = session

    def _deadline(self, timeout: float | None) -> int:
        return now() + int((self._timeout if timeout is None else timeout) * 1e6)

    def _on_message(self, head: Header, frames: list[bytes]) -> None:
        """A call to the name that our token serves: there are no methods here."""
        if head.kind == Kind.CALL:
            origin = decode_origin(frames[-1])
            reply = header.encode(Header(VERSION, Kind.ERROR, origin.connection, "", head.id))
            error = NotSupported(f"{head.peer} has no method {head.method!r}")
            self.session.check_room()
            self.session.link.wire.send([reply, codec.encode_error(error)])


class Stream:
    """One call: an asynchronous iterator over its chunks and its end, and a context that cancels on leaving.

    Also cancels when it is dropped or the task that waits on it is cancelled. A call that never reached its
    service, because that is just being restarted, is repeated until its deadline.
    """

    def __init__(
        self,
        client: AsyncClient,
        target: str,
        frame: bytes,
        types: tuple[Any, Any],
        deadline: int,
        handle: int,
        trace: int,
    ) -> None:
        self._client = client
        self._request = (target, frame, deadline)
        self._types = types
        self._deadline = deadline
        self._handle = handle
        self._trace = trace
        self._answers: deque[Answer] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._id = 0
        self._open = False
        self._started = False
        self._ended = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        if not self._answers or not self._started:
            await self._wait()
        return self._take()

    async def batch(self) -> list[Any]:
        """Everything that has come, at least one; empty after the end."""
        if self._ended:
            return []
        values = [await self.__anext__()]
        # An error waits for the next call, so that what came before it is not lost.
        while self._answers and self._answers[0].error is None:
            values.append(self._take())
        return values

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Withdraw the call; does nothing after its end."""
        self._ended = True
        if self._open:
            self._open = False
            with suppress(HostDown, Busy):
                self._client.session.check_room()
                self._client.session.link.cancel(self._id)
                self._client.session.kick()

    def __del__(self) -> None:
        self.cancel()

    def _take(self) -> Any:
        answer = self._answers.popleft()
        self._ended = answer.kind in FINAL
        if answer.error is not None:
            raise answer.error
        type = self._types[self._ended]
        return codec.decode_any(answer.body) if type is None else codec.decode(answer.body, type)

    async def _wait(self) -> None:
        """Wait for an answer that is not a reason to try again."""
        try:
            while True:
                if not self._open and not self._answers:
                    await self._send()
                while not self._answers:
                    self._waiter = self._client.session.future()
                    await self._waiter
                if self._started or not self._may_retry(self._answers[0].error):
                    self._started = True
                    return
                error = self._answers.popleft().error
                await self._pause(error)
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _send(self) -> None:
        target, frame, deadline = self._request
        handle = await self._client.resolve(self._handle, deadline)
        session = self._client.session
        session.check_room()
        # Held weakly: a stream that its user has dropped is cancelled, not kept alive by its call.
        this = weakref.ref(self)

        def listener(answer: Answer) -> None:
            if (stream := this()) is not None:
                stream._on_answer(answer)

        self._id = session.link.call(target, frame, deadline, listener, handle=handle, trace=self._trace)
        self._open = True
        session.kick()

    def _on_answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        if answer.kind in FINAL:
            self._open = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _may_retry(self, error: LLMOSError | None) -> bool:
        if not isinstance(error, HostDown | AccessDenied) or error.details.get("delivered", True):
            return False
        return now() + RETRY_SECONDS * 1e6 < self._deadline

    async def _pause(self, error: LLMOSError | None) -> None:
        session = self._client.session
        number = session.number
        await asyncio.sleep(RETRY_SECONDS)
        # Unknown to the kernel, and not because it was started anew: it has closed our connection.
        if isinstance(error, AccessDenied) and session.number == number:
            session.greet()

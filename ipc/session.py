"""One connection to the kernel on an asyncio event loop; what the asyncio client is built on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from llmos.ipc import codec, header, sockets
from llmos.ipc.calls import FINAL, Answer
from llmos.ipc.errors import Busy, HostDown, LLMOSError, ProtocolError
from llmos.ipc.header import Header, Kind
from llmos.ipc.link import Link, now
from llmos.ipc.sockets import CurveClient
from llmos.kernel.messages import Hello, Welcome

RETRY_SECONDS = 0.05
TICK_SECONDS = 0.1
GRACE_MICROS = 100_000
BATCH = 256
log = logging.getLogger("llmos")


class Session:
    """A connection to the kernel, under one token, that outlives the kernel.

    ``number`` grows with every loss of the connection: what was agreed with the kernel under an earlier
    number no longer holds. ``on_message`` is given what is no answer to a call; ``on_lost`` runs at each
    loss.
    """

    def __init__(
        self, address: str, token: str, *, control: bool = False, curve: CurveClient | None = None
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.link = Link(self._context, address, token, control=control, curve=curve)
        self.number = 0
        self.welcome: Welcome | None = None
        self.on_message: Callable[[Header, list[bytes]], None] = lambda head, frames: None
        self.on_lost: Callable[[], None] = lambda: None
        self._hello = Hello(token, control)
        self._greeting: asyncio.Task[Welcome] | None = None
        self._kicked = False
        self._closed = False

    def open(self) -> None:
        """Begin to read and to say hello, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for socket in (self.link.socket, self.link.monitor):
            self._loop.add_reader(socket.fileno(), self._drain)
        self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)
        self.greet()

    def greet(self) -> None:
        """Say hello (again)."""
        if self._greeting is None or self._greeting.done():
            self._greeting = self._loop.create_task(self._greet())
            # A refusal is told to whoever waits; nobody has to.
            self._greeting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def ready(self, deadline: int) -> Welcome:
        """Wait until the kernel has welcomed us; raises what it refuses us with, HostDown after ``deadline``
        (microseconds since the Unix epoch)."""
        while True:
            greeting = self._greeting
            if greeting is None:
                raise HostDown("this client is closed")
            if greeting.done() and not greeting.cancelled():
                return greeting.result()
            done, _ = await asyncio.wait({greeting}, timeout=max(0.0, (deadline - now()) / 1e6))
            if not done:
                raise HostDown("no kernel answered in time: is the system up? try: llmos up")

    async def verb(self, method: str, body: object, deadline: int = 0) -> bytes:
        """Ask something of the kernel itself; the body of its reply."""
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self.check_room()
        self.link.verb(method, body, deadline, lambda a: None if answer.done() else answer.set_result(a))
        self.kick()
        result = await answer
        if result.error is not None:
            raise result.error
        return result.body

    def send(self, method: str, body: object) -> None:
        """Tell the kernel something that it does not answer."""
        self.check_room()
        self.link.verb(method, body)
        self.kick()

    @property
    def welcomed(self) -> bool:
        """Whether the kernel knows us at this moment, as far as we know."""
        return self._greeting is not None and self._greeting.done()

    def future(self) -> asyncio.Future[Any]:
        """A future of this session's event loop."""
        return self._loop.create_future()

    def check_room(self) -> None:
        """Busy if the queue to the kernel is full; sending would block the event loop."""
        if self._closed:
            raise HostDown("this client is closed")
        if not _events(self.link.socket) & zmq.POLLOUT:
            raise Busy("the queue to the kernel is full")

    def kick(self) -> None:
        """Look at the sockets soon: their descriptors tell of each arrival once, and sending may eat that."""
        if not self._kicked and not self._closed:
            self._kicked = True
            self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Leave; the kernel forgets this connection's capabilities and cancels its calls."""
        if self._closed:
            return
        self._closed = True
        if self._greeting is not None:
            self._ticker.cancel()
            self._greeting.cancel()
            self._greeting = None
            for socket in (self.link.socket, self.link.monitor):
                self._loop.remove_reader(socket.fileno())
        self.link.calls.fail_all("this client was closed")
        self.link.close()
        self._context.term()

    def _drain(self) -> None:
        self._kicked = False
        if self._closed:
            return
        count = 0
        for message in self.link.wire.drain(BATCH):
            count += 1
            try:
                frames = sockets.to_bytes(message)
                self._switch(header.decode(frames[0]), frames)
            except ProtocolError as error:
                log.warning("dropped a message: %s", error)
        if count == BATCH:
            self.kick()
            return
        # After the messages: what the kernel said before it went still counts.
        if _events(self.link.monitor) & zmq.POLLIN and self.link.lost():
            self._lost()

    def _switch(self, head: Header, frames: list[bytes]) -> None:
        if head.kind in FINAL or head.kind == Kind.CHUNK:
            self.link.deliver(head, frames)
        else:
            self.on_message(head, frames)

    def _lost(self) -> None:
        log.warning("the connection to the kernel broke; saying hello again")
        self.number += 1
        if self._greeting is not None:
            self._greeting.cancel()
            self._greeting = None
        self.greet()
        self.on_lost()

    async def _greet(self) -> Welcome:
        while True:
            try:
                self.welcome = codec.decode(await self.verb("hello", self._hello), Welcome)
                return self.welcome
            except LLMOSError as error:
                if isinstance(error, ProtocolError) and self.welcome is not None:
                    return self.welcome  # the kernel knows us after all
                if error.details.get("delivered", True):
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    def _tick(self) -> None:
        # A little past the deadline, so that the kernel's own word on it arrives first.
        self.link.calls.expire(now() - GRACE_MICROS)
        self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)


def _events(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.EVENTS))

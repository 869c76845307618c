"""The service loop: get, switch, reply. A service's author writes handlers only.

A handler is a method marked ``@method``; its name is the method's on the wire, its annotations are the
types of request and reply. It returns the reply's body, or is annotated to return ``Later`` and answers
through the ``Incoming`` it was given. Raising an LLMOSError answers with that error; anything else ends the
process, and the supervisor starts it anew.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import signal
import threading
import time
import typing
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import zmq

from llmos.ipc import codec, header, limits, paths, sockets
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Canceled, HostDown, LLMOSError, NotSupported, ProtocolError
from llmos.ipc.grant import Origin, decode_origin
from llmos.ipc.header import VERSION, Header, Kind
from llmos.ipc.link import Link, now
from llmos.kernel.messages import Beat, Event

F = TypeVar("F", bound=Callable[..., Any])

HELLO_SECONDS = 30.0
BEAT_SECONDS = 0.5
BATCH = 256
log = logging.getLogger("llmos")


class Later:
    """The return type of a handler that answers through its ``Incoming``, once or as a stream."""


def method(handler: F) -> F:
    """Mark a method of a Server as callable from outside."""
    handler.__llmos_method__ = True  # type: ignore[attr-defined]
    return handler


class Incoming:
    """A call being served: who it is from, and how it is answered. A cast has no answer."""

    __slots__ = ("_server", "buffers", "deadline", "head", "on_cancel", "origin")

    def __init__(self, server: Server, head: Header, origin: Origin, buffers: list[bytes]) -> None:
        self._server = server
        self.head = head
        self.origin = origin
        self.buffers = buffers
        self.deadline = head.deadline
        self.on_cancel: Callable[[], object] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What identifies this call at the kernel; names it in ``acting``."""
        return self.origin.connection, self.head.id

    def reply(self, body: object = None) -> None:
        self._finish(Kind.REPLY, codec.encode(body))

    def chunk(self, body: object) -> None:
        self._server.answer(self, Kind.CHUNK, codec.encode(body))

    def end(self, body: object = None) -> None:
        self._finish(Kind.END, codec.encode(body))

    def fail(self, error: LLMOSError) -> None:
        self._finish(Kind.ERROR, codec.encode_error(error))

    def _finish(self, kind: Kind, body: bytes) -> None:
        if self._server.serving.pop(self.key, None) is not None:
            self._server.answer(self, kind, body)


class _Handler(typing.NamedTuple):
    function: Callable[..., Any]
    request: Any
    later: bool


class Server:
    """Base of every service. Subclasses set ``name`` and define methods; ``start`` runs once, before ready.

    Everything runs on one thread. ``call`` makes a call whose answers go to a listener; ``every`` and
    ``after`` run functions by the clock; ``on_readable`` by a file descriptor.
    """

    name: ClassVar[str] = ""
    watch: ClassVar[bool] = False

    def __init__(self, run: Path | None = None, name: str = "") -> None:
        run = run or paths.run_dir()
        self.service = name or self.name
        token = paths.read_token(self.service, run)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = Link(self.context, paths.socket_address("control", run), token, control=True)
        self.data = Link(self.context, paths.socket_address("kernel", run), token)
        self.serving: dict[tuple[int, int], Incoming] = {}
        self.progress = 0
        self._handlers = self._find_handlers()
        self._waiting: deque[tuple[Header, list[bytes]]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._readable: dict[Any, Callable[[], None]] = {}
        self._poller = zmq.Poller()
        for source in (self.control.monitor, self.control.socket, self.data.socket):
            self._poller.register(source, zmq.POLLIN)
        self._running = True

    # --- what a service overrides ---

    def start(self) -> None:
        """Prepare; the connections are up, and calls wait until this returns."""

    def stop(self) -> None:
        """Finish; called once, after the last message."""

    def on_up(self, name: str, connection: int) -> None:
        """A service came up (with ``watch`` set)."""

    def on_down(self, name: str, connection: int) -> None:
        """A service went down (with ``watch`` set)."""

    def on_kernel_restart(self) -> None:
        """The kernel was started anew: all calls, served and made, are gone."""

    def work(self) -> bool:
        """A slice of work between messages; True asks for another slice before waiting."""
        return False

    def beat(self) -> Beat:
        """How this service is; a loop that turns is healthy."""
        return Beat(self.progress)

    # --- what a service uses ---

    def call(
        self,
        target: str,
        body: object,
        listener: Callable[[Answer], None],
        *,
        acting: Incoming | None = None,
        timeout: float = 0.0,
    ) -> int:
        """Call "service.method"; ``acting`` makes it under the grant of a call being served here."""
        if acting is not None:
            deadline, trace, key = acting.deadline, acting.head.trace, acting.key
        else:
            deadline, trace, key = 0, 0, None
        if timeout:
            deadline = min(deadline or 1 << 62, now() + int(timeout * 1e6))
        return self.data.call(target, codec.encode(body), deadline, listener, trace=trace, acting=key)

    def cast(self, target: str, body: object) -> None:
        self.data.cast(target, codec.encode(body))

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), function))

    def every(self, seconds: float, function: Callable[[], None]) -> None:
        def again() -> None:
            function()
            self.after(seconds, again)

        self.after(seconds, again)

    def on_readable(self, source: Any, function: Callable[[], None]) -> None:
        """Run ``function`` when a descriptor or a ZeroMQ socket can be read."""
        self._readable[source] = function
        self._poller.register(source, zmq.POLLIN)

    def finish(self) -> None:
        """Leave the loop after the message at hand."""
        self._running = False

    # --- the loop ---

    def serve(self) -> None:
        """Register, then get, switch and reply until told to stop."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.finish())
        self._register()
        self.start()
        self.control.verb("ready", None)
        self.every(BEAT_SECONDS, self._beat)
        while self._running:
            self.turn(wait=not self.work())
        self.stop()
        self.control.close()
        self.data.close()
        self.context.term()

    def turn(self, wait: bool = True) -> None:
        """One turn of the loop: what is due by the clock, then what the sockets hold, control first; then
        calls, until something else is there. A call may wait for those before it. An answer that waits for
        calls holds up whatever goes on once it is known, such as a device that was told to stop."""
        clock = time.monotonic()
        while self._timers and self._timers[0][0] <= clock:
            heapq.heappop(self._timers)[2]()
        wait = wait and not self._waiting
        pause = self._timers[0][0] - clock if self._timers else 1.0
        ready = dict(self._poller.poll(max(0, round(pause * 1000)) if wait else 0))
        if self.control.monitor in ready and self.control.lost():
            self._reconnect()
            return
        if self.control.socket in ready:
            self._drain(self.control)
        if self.data.socket in ready:
            self._drain(self.data)
        for source, function in self._readable.items():
            if source in ready:
                function()
        while self._waiting and self._running:
            self._switch_call(*self._waiting.popleft())
            if self.data.wire.more():
                break

    def _beat(self) -> None:
        self.control.verb("beat", self.beat())
        self.data.calls.expire(now())

    def _register(self) -> None:
        for link in (self.control, self.data):
            link.hello(HELLO_SECONDS, lambda: self._running)
        if self.watch:
            self.control.verb("watch", None)

    def _reconnect(self) -> None:
        """The kernel died; its successor knows nothing of us."""
        log.warning("the kernel went down; registering again")
        self.data.calls.fail_all("the kernel went down before the answer came")
        self.serving.clear()
        self._waiting.clear()
        try:
            self._register()
        except HostDown:
            if self._running:
                raise
            return
        self.data.lost()
        self.control.verb("ready", None)
        self.on_kernel_restart()

    def _drain(self, link: Link) -> None:
        for message in link.wire.drain(max(0, BATCH - len(self._waiting))):
            try:
                frames = sockets.to_bytes(message)
                self._switch(link, header.decode(frames[0]), frames)
            except ProtocolError as error:
                log.warning("dropped a message: %s", error)

    def _switch(self, link: Link, head: Header, frames: list[bytes]) -> None:
        if head.kind in (Kind.CALL, Kind.CAST, Kind.CANCEL):
            self._waiting.append((head, frames))
        elif head.kind == Kind.KERNEL:
            self._on_event(head, frames)
        else:
            link.deliver(head, frames)

    def _switch_call(self, head: Header, frames: list[bytes]) -> None:
        try:
            if head.kind == Kind.CANCEL:
                self._cancel(head, frames)
            else:
                self._handle(head, frames)
        except ProtocolError as error:
            log.warning("dropped a message: %s", error)

    def _handle(self, head: Header, frames: list[bytes]) -> None:
        incoming = Incoming(self, head, decode_origin(frames[-1]), frames[2:-1])
        if head.kind == Kind.CALL:
            self.serving[incoming.key] = incoming
        self.progress += 1
        try:
            handler = self._handlers.get(head.method)
            if handler is None:
                raise NotSupported(f"{self.service} has no method {head.method!r}")
            request = codec.decode(frames[1], handler.request)
            result = handler.function(request, incoming)
        except LLMOSError as error:
            incoming.fail(error)
            return
        if not handler.later:
            incoming.reply(result)

    def _cancel(self, head: Header, frames: list[bytes]) -> None:
        incoming = self.serving.get((decode_origin(frames[-1]).connection, head.id))
        if incoming is None:
            return
        if incoming.on_cancel is not None:
            incoming.on_cancel()
        incoming.fail(Canceled("the caller withdrew the call"))

    def _on_event(self, head: Header, frames: list[bytes]) -> None:
        if head.method == "stop":
            self.finish()
        elif head.method in ("up", "down"):
            event = codec.decode(frames[1], Event)
            (self.on_up if head.method == "up" else self.on_down)(event.name, event.connection)

    def answer(self, incoming: Incoming, kind: Kind, body: bytes) -> None:
        """Send one message that answers a call; one that is too large ends it with an error."""
        if len(body) > limits.BODY_BYTES:
            self.serving.pop(incoming.key, None)
            error = ProtocolError(f"an answer of {len(body)} bytes exceeds {limits.BODY_BYTES}")
            kind, body = Kind.ERROR, codec.encode_error(error)
        connection, id = incoming.key
        head = header.encode(Header(VERSION, kind, connection, "", id, 0, incoming.head.trace))
        try:
            self.data.wire.send([head, body])
        except zmq.Again:
            # The kernel has not read for a long time; the call ends by its deadline.
            log.error("the queue to the kernel is full: an answer was dropped")

    def _find_handlers(self) -> dict[str, _Handler]:
        found = {}
        for name in dir(type(self)):
            function = getattr(type(self), name)
            if getattr(function, "__llmos_method__", False):
                hints = typing.get_type_hints(function)
                request, returns = hints[function.__code__.co_varnames[1]], hints["return"]
                found[name] = _Handler(getattr(self, name), request, returns is Later)
        return found

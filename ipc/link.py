"""One connection to the kernel, under one token; what the clients and the service loop are built on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import zmq

from llmos.ipc import codec, header, sockets
from llmos.ipc.calls import Answer, CallTable, Listener
from llmos.ipc.errors import Busy, HostDown, LLMOSError
from llmos.ipc.header import VERSION, Header, Kind
from llmos.ipc.sockets import CurveClient, Wire, to_bytes
from llmos.kernel.messages import Hello, Welcome

POLL_MS = 50


def now() -> int:
    """Microseconds since the Unix epoch: the clock of deadlines."""
    return time.time_ns() // 1000


class Link:
    """A DEALER to a kernel, with the calls that are outstanding on it. Used from one thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        token: str,
        *,
        control: bool = False,
        curve: CurveClient | None = None,
    ) -> None:
        self.socket = sockets.connect(context, address, curve)
        self.wire = Wire(self.socket)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.calls = CallTable()
        self._hello = Hello(token, control)

    def hello(self, timeout: float, wanted: Callable[[], bool] = lambda: True) -> Welcome:
        """Present the token and wait; HostDown if no kernel answers within ``timeout`` seconds, or if the
        answer is ``wanted`` no more."""
        answers: deque[Answer] = deque()
        deadline = now() + int(timeout * 1e6)
        self.verb("hello", self._hello, deadline, answers.append)
        while not answers:
            if not self.socket.poll(POLL_MS):
                if now() > deadline or not wanted():
                    raise HostDown(
                        f"no kernel answered within {timeout:g} s: is the system up? try: llmos up"
                    )
                continue
            frames = to_bytes(self.wire.receive())
            self.deliver(header.decode(frames[0]), frames)
        answer = answers.popleft()
        if answer.error is not None:
            raise answer.error
        return codec.decode(answer.body, Welcome)

    def lost(self) -> bool:
        """Whether the connection broke since this was last asked; its outstanding calls have then failed."""
        broke = False
        while self.monitor.poll(0):
            self.monitor.recv_multipart()
            broke = True
        if broke:
            self.calls.fail_all("the kernel went down before the answer came")
        return broke

    def call(
        self,
        target: str,
        body: bytes,
        deadline: int,
        listener: Listener,
        *,
        handle: int = 0,
        trace: int = 0,
        acting: tuple[int, int] | None = None,
    ) -> int:
        """Send a call to "service.method"; its answers go to ``listener``. Returns the message id."""
        peer, _, method = target.rpartition(".")
        id = self.calls.open(peer, method, deadline, listener)
        self._send(Header(VERSION, Kind.CALL, peer, method, id, handle, trace, deadline, acting), body)
        return id

    def cast(self, target: str, body: bytes) -> None:
        """Send a message that has no answer."""
        peer, _, method = target.rpartition(".")
        self._send(Header(VERSION, Kind.CAST, peer, method, 0), body)

    def cancel(self, id: int) -> None:
        """Withdraw a call; what it still answers is ignored."""
        call = self.calls.drop(id)
        if call is not None:
            self._send(Header(VERSION, Kind.CANCEL, call.peer, call.method, id), codec.EMPTY)

    def verb(self, method: str, body: object, deadline: int = 0, listener: Listener | None = None) -> None:
        """Ask something of the kernel itself."""
        id = self.calls.open("", method, deadline, listener) if listener else 0
        self._send(Header(VERSION, Kind.KERNEL, "", method, id, 0, 0, deadline), codec.encode(body))

    def deliver(self, head: Header, frames: list[bytes]) -> None:
        """Hand an incoming answer to the call it belongs to."""
        error: LLMOSError | None = codec.decode_error(frames[1]) if head.kind == Kind.ERROR else None
        self.calls.dispatch(head, frames[1], frames[2:], error)

    def close(self) -> None:
        """Leave; the kernel forgets this connection's capabilities and cancels its calls."""
        if not self.socket.closed:
            with suppress(Busy):
                self.verb("bye", None)
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close(linger=200)

    def _send(self, head: Header, body: bytes) -> None:
        try:
            self.wire.send([header.encode(head), body])
        except zmq.Again:
            self.calls.drop(head.id)
            raise Busy("the queue to the kernel is full, or it admits no connection from here") from None

"""Opening the sockets: ipc in the run folder, or tcp with CURVE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import zmq
import zmq.backend

from llmos.ipc import limits
from llmos.ipc.errors import InvalidArgument, ProtocolError

_NOBLOCK = int(zmq.NOBLOCK)
_SEND_MORE = int(zmq.SNDMORE | zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)


class CurveClient(NamedTuple):
    """Keys of a peer that joins over tcp, Z85-encoded."""

    server_public: bytes
    public: bytes
    secret: bytes


def check_address(address: str) -> None:
    """Refuse an address that would listen on every interface."""
    host = address.removeprefix("tcp://").rsplit(":", 1)[0]
    if address.startswith("tcp://") and host in ("*", "0.0.0.0", "[::]", "::"):
        raise InvalidArgument(f"{address} listens on every interface: name one address")


def configure(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """The options that every socket here has: bounded queues, bounded frames, nothing left at close."""
    socket.set(zmq.SNDHWM, limits.SEND_QUEUE)
    socket.set(zmq.RCVHWM, limits.SEND_QUEUE)
    socket.set(zmq.MAXMSGSIZE, limits.FRAME_BYTES)
    socket.set(zmq.LINGER, 0)
    return socket


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, curve: CurveClient | None = None
) -> zmq.Socket[bytes]:
    """A DEALER connected to a kernel."""
    if address.startswith("tcp://") and curve is None:
        raise InvalidArgument("tcp needs CURVE keys")
    socket = configure(context.socket(zmq.DEALER))
    if curve is not None:
        socket.curve_serverkey = curve.server_public
        socket.curve_publickey = curve.public
        socket.curve_secretkey = curve.secret
    socket.connect(address)
    return socket


class Wire:
    """Sends and receives whole messages on a socket, never waiting.

    It calls the compiled half of pyzmq directly: the checks and conversions of ``send_multipart`` and
    ``recv_multipart`` cost more than all that the kernel does with a message.
    """

    __slots__ = ("_get", "_recv", "_send")

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._send = zmq.backend.Socket.send.__get__(socket)
        self._recv = zmq.backend.Socket.recv.__get__(socket)
        self._get = zmq.backend.Socket.get.__get__(socket)

    def send(self, frames: list[bytes]) -> None:
        """Send a message; zmq.Again if the queue is full, and then nothing was sent."""
        send = self._send
        for frame in frames[:-1]:
            send(frame, _SEND_MORE)
        send(frames[-1], _NOBLOCK)

    def receive(self) -> list[zmq.Frame]:
        """The next message's frames; zmq.Again where there is none."""
        recv = self._recv
        frame = recv(_NOBLOCK, False)
        frames = [frame]
        while frame.more:
            frame = recv(_NOBLOCK, False)
            frames.append(frame)
        return frames

    def more(self) -> bool:
        """Whether a message is waiting; cheaper than the exception that says there is none."""
        return bool(self._get(_EVENTS) & _POLLIN)

    def drain(self, limit: int) -> Iterator[list[zmq.Frame]]:
        """The messages that are waiting, at most ``limit`` of them."""
        for count in range(limit):
            if count == 1 and not self.more():
                return
            try:
                yield self.receive()
            except zmq.Again:
                return


def to_bytes(frames: list[zmq.Frame]) -> list[bytes]:
    """The content of frames; ProtocolError if there are too many."""
    if len(frames) > limits.FRAMES:
        raise ProtocolError(f"a message of {len(frames)} frames exceeds {limits.FRAMES}")
    return [frame.bytes for frame in frames]

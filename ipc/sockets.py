"""Opening the sockets: ipc in the run folder, or tcp with CURVE."""

from __future__ import annotations

from typing import NamedTuple

import zmq

from llmos.ipc import limits
from llmos.ipc.errors import InvalidArgument, ProtocolError


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


def receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    """The next message, or None where there is none; never waits. ProtocolError if it has too many frames."""
    try:
        frames = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    if len(frames) > limits.FRAMES:
        raise ProtocolError(f"a message of {len(frames)} frames exceeds {limits.FRAMES}")
    return frames

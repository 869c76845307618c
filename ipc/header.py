"""Frame 0 of every message: a fixed MessagePack array."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from llmos.ipc import limits
from llmos.ipc.errors import ProtocolError

VERSION = 1


class Kind(IntEnum):
    CALL = 1
    REPLY = 2
    CAST = 3
    CHUNK = 4
    END = 5
    ERROR = 6
    CANCEL = 7
    KERNEL = 8


class Header(msgspec.Struct, frozen=True, array_like=True):
    """The header; elements that a newer peer appends are ignored.

    ``peer`` is the destination: a service name for call, cast and cancel; the caller's connection number for
    reply, chunk, end and error; "" for the kernel's own verbs. ``id`` is chosen by the caller and unique
    among its outstanding calls. ``handle`` names a capability of the sending connection (0: its first one).
    ``trace`` is 0 or a trace id. ``deadline`` is in microseconds since the Unix epoch, 0 for none.
    ``acting`` is (connection, id) of a call the sender is serving, and makes this call under that caller's
    grant; the sender's own grant must allow the method, too.
    """

    version: int
    kind: int
    peer: str | int
    method: str
    id: int
    handle: int = 0
    trace: int = 0
    deadline: int = 0
    acting: tuple[int, int] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Header).decode


def encode(header: Header) -> bytes:
    """The header as bytes."""
    return _encode(header)


def decode(frame: bytes) -> Header:
    """The header in a frame; ProtocolError if it is none."""
    if len(frame) > limits.HEADER_BYTES:
        raise ProtocolError(f"a header of {len(frame)} bytes exceeds {limits.HEADER_BYTES}")
    try:
        header = _decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed header: {error}") from None
    if header.version != VERSION:
        raise ProtocolError(f"protocol version {header.version} is not spoken here; use {VERSION}")
    return header

"""Bodies: MessagePack, typed by ``msgspec.Struct`` where a type is known, bounded everywhere."""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

from llmos.ipc import limits
from llmos.ipc.errors import InvalidArgument, LLMOSError, ProtocolError, from_code

T = TypeVar("T")

EMPTY = b"\xc0"

_encode = msgspec.msgpack.Encoder().encode
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error message."""

    code: str
    message: str
    details: dict[str, Any] = {}


def encode(body: object) -> bytes:
    """A body as bytes; ``body`` is a Struct or plain values."""
    return _encode(body)


def decode(frame: bytes, type: type[T]) -> T:
    """The body in a frame, checked against its type; InvalidArgument says which field is wrong."""
    if len(frame) > limits.BODY_BYTES:
        raise ProtocolError(f"a body of {len(frame)} bytes exceeds {limits.BODY_BYTES}")
    decoder = _decoders.get(type)
    if decoder is None:
        decoder = _decoders[type] = msgspec.msgpack.Decoder(type)
    try:
        value: T = decoder.decode(frame)
    except msgspec.ValidationError as error:
        raise InvalidArgument(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed body: {error}") from None
    return value


def decode_any(frame: bytes) -> Any:
    """A body whose type is not known, as plain values, within the limits on size, depth and counts."""
    if len(frame) > limits.BODY_BYTES:
        raise ProtocolError(f"a body of {len(frame)} bytes exceeds {limits.BODY_BYTES}")
    try:
        value = msgpack.unpackb(frame, max_array_len=limits.ITEMS, max_map_len=limits.ITEMS, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed body: {error}") from None
    if _depth_exceeds(value, limits.DEPTH):
        raise ProtocolError(f"a body nested deeper than {limits.DEPTH}")
    return value


def _depth_exceeds(value: Any, depth: int) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_depth_exceeds(item, depth - 1) for item in items)


def encode_error(error: LLMOSError) -> bytes:
    """An error as the body of an error message; details that are no plain values travel as text."""
    try:
        return _encode(ErrorBody(error.code, error.message, error.details))
    except (TypeError, OverflowError):
        return _encode(ErrorBody(error.code, error.message, {k: str(v) for k, v in error.details.items()}))


def decode_error(frame: bytes) -> LLMOSError:
    """The error in the body of an error message."""
    try:
        body = decode(frame, ErrorBody)
    except LLMOSError as error:
        return error
    return from_code(body.code, body.message, **body.details)

"""Bodies and headers on the wire, checked against an independent MessagePack implementation."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc import codec, header, limits
from llmos.ipc.errors import (
    BY_CODE,
    InvalidArgument,
    IOFailure,
    LLMOSError,
    NotFound,
    ProtocolError,
    from_code,
)
from llmos.ipc.grant import Grant
from llmos.ipc.header import Header

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(plain)
def test_any_plain_value_survives(value: object) -> None:
    assert codec.decode_any(codec.encode(value)) == value
    assert msgpack.unpackb(codec.encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused_by_type(frame: bytes) -> None:
    for decode in (codec.decode_any, lambda f: codec.decode(f, Grant), header.decode):
        with contextlib.suppress(ProtocolError, InvalidArgument):
            decode(frame)


@pytest.mark.parametrize(
    "frame", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 100_000, b"\xc6\xff\xff\xff\xff"]
)
def test_claims_of_huge_or_deep_values_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode_any(frame)
    with pytest.raises((ProtocolError, InvalidArgument)):
        codec.decode(frame, Grant)


def test_limits_on_size_and_depth() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        codec.decode_any(b"\xc4" + bytes(limits.BODY_BYTES))
    nested: object = 1
    for _ in range(limits.DEPTH + 1):
        nested = [nested]
    with pytest.raises(ProtocolError, match="nested"):
        codec.decode_any(codec.encode(nested))


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"\$\.tenant"):
        codec.decode(codec.encode({"principal": "p", "tenant": 5}), Grant)


def test_unknown_fields_and_further_header_elements_are_ignored() -> None:
    assert codec.decode(codec.encode({"principal": "p", "tenant": "t", "new": 1}), Grant).tenant == "t"
    newer = codec.encode([1, 1, "a", "b", 5, 0, 0, 0, None, "from the future"])
    assert header.decode(newer) == Header(1, 1, "a", "b", 5)


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(ProtocolError, match="version 2"):
        header.decode(codec.encode([2, 1, "a", "b", 5]))


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_crosses_the_wire_as_itself(code: str) -> None:
    error = codec.decode_error(codec.encode_error(from_code(code, "why", limit=3)))
    assert type(error) is BY_CODE[code]
    assert (error.message, error.details) == ("why", {"limit": 3})


def test_an_error_code_of_a_newer_peer_becomes_eio() -> None:
    assert isinstance(from_code("ENEW", "?"), IOFailure)


def test_details_that_are_no_plain_values_travel_as_text() -> None:
    error: LLMOSError = NotFound("gone", where=object())
    assert isinstance(codec.decode_error(codec.encode_error(error)).details["where"], str)

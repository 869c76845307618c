"""Sealed bytes: only the same key, the same place and the same bytes open them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc.errors import InvalidArgument, IOFailure
from llmos.services.security import keys

MASTER = bytes(range(32))
KEY = keys.tenant_key(MASTER, "t", "pages")


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_what_was_sealed_opens(plaintext: bytes, associated: bytes) -> None:
    sealed = keys.seal(KEY, plaintext, associated)
    assert len(sealed) == len(plaintext) + keys.OVERHEAD
    assert keys.unseal(KEY, sealed, associated) == plaintext


@given(st.binary(min_size=1, max_size=50), st.data())
def test_any_changed_bit_is_found(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(keys.seal(KEY, plaintext))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IOFailure):
        keys.unseal(KEY, bytes(sealed))


@pytest.mark.parametrize("length", range(keys.OVERHEAD))
def test_what_is_cut_short_is_found(length: int) -> None:
    with pytest.raises(IOFailure):
        keys.unseal(KEY, keys.seal(KEY, b"text")[:length])


def test_another_place_does_not_open_it() -> None:
    with pytest.raises(IOFailure, match="another"):
        keys.unseal(KEY, keys.seal(KEY, b"text", b"page 1"), b"page 2")


def test_every_tenant_and_purpose_has_its_own_key() -> None:
    pairs = [("t", "pages"), ("u", "pages"), ("t", "tasks"), ("tp", "ages"), ("ages", "tp")]
    derived = {keys.tenant_key(MASTER, tenant, purpose) for tenant, purpose in pairs}
    assert len(derived) == len(pairs)
    assert keys.tenant_key(MASTER, "t", "pages") == KEY
    assert keys.tenant_key(bytes(32), "t", "pages") != KEY


def test_sealing_twice_gives_different_bytes() -> None:
    assert keys.seal(KEY, b"text") != keys.seal(KEY, b"text")


def test_keys_have_their_length() -> None:
    with pytest.raises(InvalidArgument):
        keys.tenant_key(b"short", "t", "pages")
    with pytest.raises(InvalidArgument):
        keys.seal(b"short", b"")
    with pytest.raises(InvalidArgument):
        keys.tenant_key(MASTER, "", "pages")

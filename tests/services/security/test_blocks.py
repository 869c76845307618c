"""The reader of token bytes: it refuses what it cannot read, and misses no constant."""

from __future__ import annotations

import pytest
from biscuit_auth import BiscuitBuilder, BlockBuilder, KeyPair
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc.errors import AccessDenied
from llmos.services.security import blocks

ROOT = KeyPair()


def token(*sources: str) -> bytes:
    biscuit = BiscuitBuilder('grant("x");').build(ROOT.private_key)
    for source in sources:
        biscuit = biscuit.append(BlockBuilder(source))
    return bytes(biscuit.to_bytes())


def test_a_token_without_appended_blocks_has_no_constants() -> None:
    assert blocks.read(token()) == blocks.Appended()


def test_constants_of_all_blocks_are_found() -> None:
    found = blocks.read(
        token(
            'check if model("one") or n($x), $x < -7, {"two", "three"}.contains($x)',
            "check if time($t), $t < 2027-01-01T00:00:00Z, [1, [2, 2028-01-01T00:00:00Z]].contains($t)",
            "reject if p(9223372036854775807)",
        )
    )
    assert {"one", "two", "three"} <= set(found.strings)
    assert found.integers == {-7, 1, 2, (1 << 63) - 1}
    assert found.dates == {1798761600, 1830297600}


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_read_or_refused(data: bytes) -> None:
    try:
        blocks.read(data)
    except AccessDenied:
        return


@given(st.data())
def test_a_token_damaged_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(token('check if model("one"), {"two", "three"}.contains("x") || 1 < 2'))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        blocks.read(bytes(whole))
    except AccessDenied:
        return


@pytest.mark.parametrize("data", [b"\x1a", b"\x1a\x05ab", b"\x1b", b"\x18\x01", b"\xff" * 12])
def test_what_is_cut_short_or_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(AccessDenied):
        blocks.read(data)


def test_terms_nested_very_deep_do_not_exhaust_the_stack() -> None:
    term = b"\x10\x01"
    for _ in range(5000):
        inner = b"\x0a" + length(term) + term
        term = b"\x4a" + length(inner) + inner
    predicate = b"\x12" + length(term) + term
    query = b"\x12" + length(predicate) + predicate
    check = b"\x0a" + length(query) + query
    block = b"\x32" + length(check) + check
    signed = b"\x0a" + length(block) + block
    with pytest.raises(AccessDenied, match="deep"):
        blocks.read(b"\x1a" + length(signed) + signed)


def length(data: bytes) -> bytes:
    value, coded = len(data), b""
    while value > 127:
        coded, value = coded + bytes([value & 127 | 128]), value >> 7
    return coded + bytes([value])

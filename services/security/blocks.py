"""What holders may append to a token, read from its bytes (the Biscuit specification's schema.proto).

A block may hold checks and nothing else. Facts and rules cannot widen a token, and nor can a block that a
third party signed, but they make evaluation as expensive as their author likes: a join over a few dozen facts
runs for minutes and no time limit of the engine interrupts it. The same goes for closures, regular
expressions and long sums of strings. Without them an evaluation is linear in the size of the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from llmos.ipc.errors import AccessDenied

MAX_BLOCKS = 16
MAX_OPERATIONS = 512
MAX_ADDITIONS = 8
MAX_DEPTH = 16
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# Field numbers of schema.proto: of the token, a signed block, a block, a check, a rule, ...
TOKEN_BLOCK = 3
SIGNED_PAYLOAD, SIGNED_EXTERNAL = 1, 4
BLOCK_SYMBOL, BLOCK_CONTEXT, BLOCK_VERSION, BLOCK_CHECK = 1, 2, 3, 6
CHECK_QUERY = 1
RULE_BODY, RULE_EXPRESSION = 2, 3
PREDICATE_TERM = 2
OP_VALUE, OP_BINARY, OP_CLOSURE = 1, 3, 4
BINARY_KIND = 1
CLOSURE_OP = 2
KIND_REGEX, KIND_ADD = 8, 9
TERM_INTEGER, TERM_DATE, TERM_SET, TERM_ARRAY, TERM_MAP = 2, 4, 7, 9, 10


@dataclass
class Appended:
    """The constants in all appended blocks: strings (predicate and variable names among them), integers,
    dates in seconds since the Unix epoch."""

    strings: list[str] = field(default_factory=list)
    integers: set[int] = field(default_factory=set)
    dates: set[int] = field(default_factory=set)
    operations: int = 0
    additions: int = 0


def read(token: bytes) -> Appended:
    """The constants in the appended blocks of a token whose signatures were verified.

    Raises AccessDenied where a block holds anything but checks, or a check is of a kind not evaluated here.
    """
    found = Appended()
    signed = [value for number, value in _fields(token) if number == TOKEN_BLOCK]
    if len(signed) >= MAX_BLOCKS:
        raise AccessDenied(f"a token of over {MAX_BLOCKS} blocks is not accepted: mint a new one")
    for block in signed:
        for number, value in _fields(_bytes(block)):
            if number == SIGNED_EXTERNAL:
                raise AccessDenied("a token with a third party's block is not accepted")
            if number == SIGNED_PAYLOAD:
                _read_block(_bytes(value), found)
    return found


def _read_block(block: bytes, found: Appended) -> None:
    for number, value in _fields(block):
        if number == BLOCK_SYMBOL:
            found.strings.append(_text(_bytes(value)))
        elif number == BLOCK_CHECK:
            for query in _all(_bytes(value), CHECK_QUERY):
                _read_query(query, found)
        elif number not in (BLOCK_CONTEXT, BLOCK_VERSION):
            raise AccessDenied("an appended block may hold checks only: no facts, rules or scopes")


def _read_query(query: bytes, found: Appended) -> None:
    for predicate in _all(query, RULE_BODY):
        for term in _all(predicate, PREDICATE_TERM):
            _read_term(term, found)
    for expression in _all(query, RULE_EXPRESSION):
        for op in _all(expression, 1):
            _read_op(op, found)


def _read_op(op: bytes, found: Appended, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise AccessDenied(f"checks nested over {MAX_DEPTH} deep are not accepted")
    for number, value in _fields(op):
        if number == OP_CLOSURE:
            _read_closure(_bytes(value), found, depth)
        elif number == OP_VALUE:
            _read_term(_bytes(value), found)
        elif number == OP_BINARY:
            _read_binary(_bytes(value), found)
    found.operations += 1
    if found.operations > MAX_OPERATIONS or found.additions > MAX_ADDITIONS:
        raise AccessDenied(
            f"checks of over {MAX_OPERATIONS} operations or {MAX_ADDITIONS} sums are not accepted"
        )


def _read_closure(closure: bytes, found: Appended, depth: int) -> None:
    """The right-hand side of "&&" and "||" is a closure without parameters, evaluated once at most."""
    for number, value in _fields(closure):
        if number != CLOSURE_OP:
            raise AccessDenied("a check with a closure is not accepted: name what is allowed in a set")
        _read_op(_bytes(value), found, depth + 1)


def _read_binary(binary: bytes, found: Appended) -> None:
    for number, kind in _fields(binary):
        if number == BINARY_KIND and kind == KIND_REGEX:
            raise AccessDenied("a regular expression is not accepted: name what is allowed in a set")
        found.additions += number == BINARY_KIND and kind == KIND_ADD


def _read_term(term: bytes, found: Appended, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise AccessDenied(f"sets nested over {MAX_DEPTH} deep are not accepted")
    for number, value in _fields(term):
        if number == TERM_INTEGER and isinstance(value, int):
            found.integers.add(value - (1 << 64) if value >> 63 else value)
        elif number == TERM_DATE and isinstance(value, int):
            found.dates.add(value)
        elif number in (TERM_SET, TERM_ARRAY):
            for inner in _all(_bytes(value), 1):
                _read_term(inner, found, depth + 1)
        elif number == TERM_MAP:
            raise AccessDenied("a check with a map is not accepted")


def _all(message: bytes, wanted: int) -> list[bytes]:
    return [_bytes(value) for number, value in _fields(message) if number == wanted]


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise AccessDenied("malformed token")
    return value


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise AccessDenied("malformed token") from None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: (number, integer or bytes)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise AccessDenied("malformed token")
        if at + size > len(message):
            raise AccessDenied("malformed token")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise AccessDenied("malformed token")

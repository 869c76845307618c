"""The audit log: one JSON line for each event, each sealed by the hash of all before it.

A line changed, removed or inserted breaks the chain from there on. Who can write the file as its owner can
also write a whole new one: keep the head (``verify`` returns it) somewhere else to notice that, and to notice
lines missing at the end. No token ever enters the log, only revocation ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from llmos.ipc.errors import IOFailure

START = "0" * 64
Kind = Literal["mint", "revoke", "refuse"]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``time`` in microseconds since the Unix epoch; ``by`` who asked; ``ids`` revocation ids."""

    time: int
    kind: Kind
    by: str
    tenant: str
    principal: str = ""
    ids: list[str] = []
    detail: str = ""


class Line(msgspec.Struct, frozen=True):
    event: msgspec.Raw
    hash: str


class Head(msgspec.Struct, frozen=True):
    """How many lines a log has, and the hash of the last one: what to keep elsewhere."""

    lines: int
    hash: str


class AuditLog:
    """Appends events; every line is on disk before ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        os.fchmod(self._descriptor, 0o600)
        self._drop_torn_line(path)
        try:
            self.head = _last(path)
        except IOFailure:
            os.close(self._descriptor)
            raise

    def append(self, event: Event) -> None:
        said = msgspec.json.encode(event)
        digest = _chain(self.head.hash, said)
        line = msgspec.json.encode(Line(msgspec.Raw(said), digest)) + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise IOFailure("the audit log cannot be written: is the disk full?")
        os.fsync(self._descriptor)
        self.head = Head(self.head.lines + 1, digest)

    def close(self) -> None:
        os.close(self._descriptor)

    def _drop_torn_line(self, path: Path) -> None:
        """A crash while a line was written leaves part of it, without a line feed."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)


def read(path: Path) -> Iterator[Event]:
    """The events of a log, without a check of the chain."""
    if path.exists():
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                yield _event(_line(data, number), number)


def verify(path: Path) -> Head:
    """The head of a log whose chain is whole; IOFailure names the first line that is not as written."""
    head = Head(0, START)
    if not path.exists():
        return head
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            line = _line(data, number)
            _event(line, number)
            digest = _chain(head.hash, bytes(line.event))
            if digest != line.hash or msgspec.json.encode(line) + b"\n" != data:
                raise IOFailure(f"{path}: line {number} was changed, or lines before it are missing")
            head = Head(number, digest)
    return head


def _chain(previous: str, said: bytes) -> str:
    return hashlib.sha256(previous.encode() + said).hexdigest()


def _last(path: Path) -> Head:
    lines, last = 0, b""
    with path.open("rb") as file:
        for data in file:
            lines, last = lines + 1, data
    return Head(lines, _line(last, lines).hash) if lines else Head(0, START)


def _line(data: bytes, number: int) -> Line:
    try:
        return msgspec.json.decode(data, type=Line)
    except msgspec.DecodeError:
        raise IOFailure(f"line {number} of the audit log is damaged") from None


def _event(line: Line, number: int) -> Event:
    try:
        return msgspec.json.decode(line.event, type=Event)
    except msgspec.DecodeError:
        raise IOFailure(f"line {number} of the audit log is damaged") from None

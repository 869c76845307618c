"""The audit log: append-only, chained, and every change to it is found."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from llmos.ipc.errors import IOFailure
from llmos.services.security import audit
from llmos.services.security.audit import AuditLog, Event


def event(number: int) -> Event:
    return Event(time=number, kind="mint", by="user", tenant="local", principal=f"p{number}", ids=["ab"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "audit.log"
    log = AuditLog(path)
    for number in range(5):
        log.append(event(number))
    log.close()
    return path


def test_what_was_appended_is_read_and_verified(path: Path) -> None:
    assert list(audit.read(path)) == [event(number) for number in range(5)]
    assert audit.verify(path).lines == 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_chain_goes_on_after_a_restart(path: Path) -> None:
    log = AuditLog(path)
    log.append(event(5))
    log.close()
    assert audit.verify(path) == log.head
    assert log.head.lines == 6


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert audit.verify(tmp_path / "none") == audit.Head(0, audit.START)
    assert list(audit.read(tmp_path / "none")) == []


@pytest.mark.parametrize(
    "forge",
    [
        lambda lines: [*lines[:2], lines[2].replace(b"p2", b"px"), *lines[3:]],
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:2], lines[2].replace(b'"hash":"', b'"hash":"0'), *lines[3:]],
        lambda lines: [*lines[:2], b" " + lines[2], *lines[3:]],
        lambda lines: [*lines[:2], b"garbage\n", *lines[3:]],
    ],
    ids=["changed", "removed", "swapped", "repeated", "beheaded", "hash", "spaced", "garbage"],
)
def test_a_forged_line_is_found(path: Path, forge: object) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(forge(lines)))  # type: ignore[operator]
    with pytest.raises(IOFailure, match="line"):
        audit.verify(path)


def test_lines_missing_at_the_end_show_in_the_head(path: Path) -> None:
    head = audit.verify(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert audit.verify(path) != head


def test_a_line_torn_by_a_crash_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    log = AuditLog(path)
    log.append(event(5))
    log.close()
    assert audit.verify(path).lines == 6

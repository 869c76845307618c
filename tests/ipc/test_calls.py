"""Every call ends exactly once."""

from __future__ import annotations

from llmos.ipc.calls import Answer, CallTable
from llmos.ipc.errors import HostDown, TimedOut
from llmos.ipc.header import VERSION, Header, Kind


def head(id: int, kind: Kind) -> Header:
    return Header(VERSION, kind, 1, "", id)


def test_chunks_keep_a_call_open_and_the_end_closes_it() -> None:
    table, got = CallTable(), list[Answer]()
    id = table.open("echo", "say", 0, got.append)
    assert table.dispatch(head(id, Kind.CHUNK), b"1", [], None)
    assert table.dispatch(head(id, Kind.END), b"2", [], None)
    assert not table.dispatch(head(id, Kind.CHUNK), b"3", [], None)
    assert [answer.body for answer in got] == [b"1", b"2"]


def test_a_passed_deadline_ends_a_call_and_no_other() -> None:
    table, got = CallTable(), list[Answer]()
    table.open("echo", "say", 100, got.append)
    table.open("echo", "say", 0, got.append)
    table.expire(99)
    assert not got
    table.expire(100)
    assert [type(answer.error) for answer in got] == [TimedOut]
    assert len(table) == 1


def test_a_lost_connection_ends_all_calls() -> None:
    table, got = CallTable(), list[Answer]()
    for _ in range(3):
        table.open("echo", "say", 0, got.append)
    table.fail_all("gone")
    assert [type(answer.error) for answer in got] == [HostDown] * 3


def test_a_dropped_call_hears_nothing() -> None:
    table, got = CallTable(), list[Answer]()
    id = table.open("echo", "say", 0, got.append)
    assert table.drop(id) is not None
    assert not table.dispatch(head(id, Kind.REPLY), b"", [], None)
    assert not got

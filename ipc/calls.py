"""The calls this process has made and has no answer to yet; no I/O, no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmos.ipc.errors import HostDown, LLMOSError, TimedOut
from llmos.ipc.header import Header, Kind

FINAL = frozenset((Kind.REPLY, Kind.END, Kind.ERROR))


class Answer(NamedTuple):
    """One message that answers a call: its kind, its body, its buffers, and the error if it is one."""

    kind: Kind
    body: bytes
    buffers: list[bytes]
    error: LLMOSError | None = None


Listener = Callable[[Answer], None]


class Outgoing(NamedTuple):
    peer: str
    method: str
    deadline: int
    listener: Listener


class CallTable:
    """Outstanding calls by message id; every one ends exactly once."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._calls: dict[int, Outgoing] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[int]:
        return iter(self._calls)

    def open(self, peer: str, method: str, deadline: int, listener: Listener) -> int:
        """Note a call that is about to be sent; its id."""
        call = next(self._ids)
        self._calls[call] = Outgoing(peer, method, deadline, listener)
        return call

    def dispatch(self, header: Header, body: bytes, buffers: list[bytes], error: LLMOSError | None) -> bool:
        """Hand an answer to the call it belongs to; False if that call has ended or never was."""
        call = self._calls.get(header.id)
        if call is None:
            return False
        if header.kind in FINAL:
            del self._calls[header.id]
        call.listener(Answer(Kind(header.kind), body, buffers, error))
        return True

    def drop(self, call: int) -> Outgoing | None:
        """Forget a call without ending it; late answers are ignored."""
        return self._calls.pop(call, None)

    def expire(self, now: int) -> None:
        """End every call whose deadline (microseconds since the Unix epoch) has passed."""
        for id, call in [(i, c) for i, c in self._calls.items() if 0 < c.deadline <= now]:
            self._end(id, TimedOut(f"{call.peer}.{call.method} did not answer before its deadline"))

    def fail_all(self, reason: str) -> None:
        """End every call, because the connection is gone."""
        for id in list(self._calls):
            self._end(id, HostDown(reason))

    def _end(self, id: int, error: LLMOSError) -> None:
        call = self._calls.pop(id)
        call.listener(Answer(Kind.ERROR, b"", [], error))

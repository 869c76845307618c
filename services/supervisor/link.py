"""The supervisor's own connection to the kernel. It never waits: the kernel may be the one that is down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from llmos.ipc import codec, header, paths
from llmos.ipc.calls import Answer
from llmos.ipc.errors import ProtocolError, TimedOut
from llmos.ipc.link import Link, now
from llmos.ipc.sockets import to_bytes
from llmos.kernel.messages import Hello, Name, Names, Stop

ANSWER_SECONDS = 5.0
BATCH = 64
HELLO_SECONDS = 600.0


class KernelLink:
    """Says hello, and again whenever the kernel was started anew; asks for the name table; stops services.

    ``welcome`` while the kernel knows us; ``unanswered`` questions in a row say that it is stuck.
    """

    def __init__(self, run: Path, token: str, on_names: Callable[[list[Name]], None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = Link(self._context, paths.socket_address("kernel", run), token)
        self._hello = Hello(token)
        self._on_names = on_names
        self._asked = False
        self.welcome = False
        self.unanswered = 0
        self._say_hello()

    @property
    def sources(self) -> tuple[Any, Any]:
        """What to poll."""
        return self._link.socket, self._link.monitor

    def ask_names(self) -> None:
        """Ask for the name table, unless an answer is still to come."""
        if self.welcome and not self._asked:
            self._asked = True
            self._link.call("kernel.names", codec.EMPTY, _deadline(), self._take_names)

    def stop(self, name: str) -> None:
        """Ask a service to leave; whether it does shows in its process."""
        self._link.call("kernel.stop", codec.encode(Stop(name)), _deadline(), lambda answer: None)

    def turn(self) -> None:
        """Take in what has come."""
        try:
            for message in self._link.wire.drain(BATCH):
                frames = to_bytes(message)
                self._link.deliver(header.decode(frames[0]), frames)
        except ProtocolError:
            self._link.calls.fail_all("the kernel sent nonsense")
        self._link.calls.expire(now())
        if self._link.lost():
            self.welcome = False
            self._say_hello()

    def forget(self) -> None:
        """The kernel has ended; that the connection broke is noticed a moment later."""
        self.welcome, self.unanswered = False, 0

    def close(self) -> None:
        self._link.close()
        self._context.term()

    def _say_hello(self) -> None:
        self._link.verb("hello", self._hello, _deadline(HELLO_SECONDS), self._take_welcome)

    def _take_welcome(self, answer: Answer) -> None:
        self.welcome = answer.error is None
        if isinstance(answer.error, TimedOut):
            self._say_hello()

    def _take_names(self, answer: Answer) -> None:
        self._asked = False
        if answer.error is None:
            self.unanswered = 0
            self._on_names(codec.decode(answer.body, Names).names)
        elif isinstance(answer.error, TimedOut):
            self.unanswered += 1


def _deadline(seconds: float = ANSWER_SECONDS) -> int:
    return now() + int(seconds * 1e6)

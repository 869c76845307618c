"""What becomes of memory's answers; the processes themselves are in ``test_swapping_process``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Busy, HostDown, IOFailure, LLMOSError, NotFound
from llmos.ipc.header import Kind
from llmos.services.memory.messages import Reserved
from llmos.services.scheduler.effects import MessageEffects
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.lasting import Room
from llmos.services.scheduler.task import Place
from tests.services.scheduler.traffic import model, task


class Server:
    """Notes what is asked of memory and when to ask again, and what the core is told."""

    def __init__(self) -> None:
        self.host = Host("null0", model())
        self.asked: list[Callable[[Answer], None]] = []
        self.later: list[Callable[[], None]] = []
        self.reserved: list[list[int]] = []
        self.killed: list[LLMOSError] = []
        paging = SimpleNamespace(reserved=lambda host, task, pages, *rest: self.reserved.append(pages))
        kill = lambda task, error, now: self.killed.append(error)  # noqa: E731
        self.core = SimpleNamespace(hosts={self.host.arena: self.host}, paging=paging, kill=kill)

    def call(self, target: str, body: Any, answered: Callable[[Answer], None], acting: Any = None) -> None:
        assert target == "memory.reserve"
        self.asked.append(answered)

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        assert seconds > 0
        self.later.append(function)


@pytest.fixture
def server() -> Server:
    """One on which a task's pages are asked for."""
    made = Server()
    wanting = task(1, [1, 2, 3], 4)
    wanting.place, wanting.call = Place.RESERVING, None
    MessageEffects(made, {}, None).reserve(made.host, wanting, 0, Room())  # type: ignore[arg-type]
    return made


def refuse(server: Server, error: LLMOSError) -> None:
    server.asked.pop()(Answer(Kind.ERROR, b"", [], error))


@pytest.mark.parametrize("error", [HostDown("memory died"), Busy("full"), NotFound("no arena")])
def test_a_memory_that_is_started_anew_is_asked_again(server: Server, error: LLMOSError) -> None:
    refuse(server, error)
    server.later.pop()()
    server.asked.pop()(Answer(Kind.END, codec.encode(Reserved([7], 0)), []))
    assert server.reserved == [[7]]
    assert not server.killed


def test_nothing_is_asked_for_a_host_that_is_gone(server: Server) -> None:
    refuse(server, NotFound("no arena"))
    server.core.hosts.clear()
    server.later.pop()()
    assert not server.asked
    assert not server.killed


def test_any_other_fault_of_memory_ends_the_task(server: Server) -> None:
    refuse(server, IOFailure("broken"))
    assert [error.message for error in server.killed] == ["broken"]

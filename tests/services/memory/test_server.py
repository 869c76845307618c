"""Memory as a process: whose tenant counts, and what happens when its scheduler dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import InvalidArgument, NoMemory, NotFound
from llmos.ipc.grant import Grant
from llmos.ipc.server import Server
from llmos.services.memory.messages import (
    Arena,
    ArenaUsage,
    Commit,
    DropArena,
    Free,
    Grow,
    Grown,
    Holding,
    Reserve,
    Reserved,
    Restore,
    Usage,
)

PROMPT = list(range(10))
ARENA = Arena(arena="a", pages=16, page_tokens=4, page_bytes=1024)
GRANTS = {
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(principal="scheduler", tenant="system", serves="scheduler"),
    "user": Grant(principal="user", tenant="local", calls=["memory.*", "kernel.names"]),
    "other": Grant(principal="other", tenant="other", calls=["memory.*"], max_pages=3),
}


class FakeScheduler(Server):
    name: ClassVar[str] = "scheduler"


@pytest.fixture
def booted(system: Callable[[dict[str, Grant]], Any]) -> Any:
    one = system(GRANTS)
    one.kernel()
    one.spawn("memory", "llmos.services.memory")
    one.wait_ready("memory")
    one.client().call("memory.arena", ARENA)
    return one


def usage(client: Client) -> ArenaUsage:
    (line,) = client.call("memory.usage", None, Usage).arenas
    assert line.free + line.cached + line.owned == line.total
    return line


def test_pages_are_reserved_grown_committed_and_freed(booted: Any) -> None:
    client = booted.client()
    assert client.call("memory.reserve", Reserve("a", 1, PROMPT), Reserved) == Reserved([0, 1, 2], 0)
    assert client.call("memory.grow", Grow("a", [(1, 1)]), Grown) == Grown([(1, [3])])
    client.call("memory.commit", Commit("a", [(1, [10], 10)]))
    assert client.call("memory.reserve", Reserve("a", 2, PROMPT), Reserved).cached == 8
    client.call("memory.free", Free("a", [1, 2]))
    assert (usage(client).owned, usage(client).cached) == (0, 2)
    client.call("memory.drop_arena", DropArena("a"))
    with pytest.raises(NotFound):
        client.call("memory.reserve", Reserve("a", 1, PROMPT))


def test_the_tenant_and_its_quota_are_those_of_the_grant(booted: Any) -> None:
    mine, other = booted.client(), booted.client("other")
    mine.call("memory.reserve", Reserve("a", 1, PROMPT))
    mine.call("memory.commit", Commit("a", [(1, [], 10)]))
    assert other.call("memory.reserve", Reserve("a", 2, PROMPT), Reserved).cached == 0
    with pytest.raises(NoMemory) as refused:
        other.call("memory.reserve", Reserve("a", 3, PROMPT))
    assert refused.value.details["quota"] == 3
    assert {line.tenant: line.owned for line in usage(mine).tenants} == {"local": 3, "other": 3}


def test_when_the_scheduler_dies_its_tasks_are_freed_and_stay_cached(booted: Any) -> None:
    scheduler = booted.serve(FakeScheduler(booted.run))
    booted.wait_ready("scheduler")
    client = booted.client()
    client.call("memory.reserve", Reserve("a", 1, PROMPT))
    client.call("memory.commit", Commit("a", [(1, [], 10)]))
    scheduler.finish()
    while usage(client).owned:
        pass
    assert usage(client).cached == 2


def test_what_a_scheduler_holds_is_restored(booted: Any) -> None:
    client = booted.client()
    client.call("memory.restore", Restore(arena=ARENA, tasks=[Holding(7, "local", [4, 5, 6], PROMPT, 10)]))
    assert usage(client).owned == 3
    assert client.call("memory.reserve", Reserve("a", 8, PROMPT), Reserved).cached == 8
    with pytest.raises(InvalidArgument):
        client.call("memory.restore", Restore(arena=ARENA, tasks=[Holding(7, "local", [99], PROMPT, 1)]))
    assert usage(client).owned == 4

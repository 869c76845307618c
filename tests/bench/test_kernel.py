"""What the kernel does with one message, without sockets: a few microseconds, whatever is in its tables."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llmos.ipc import codec, header
from llmos.ipc.grant import Grant
from llmos.ipc.header import VERSION, Header, Kind
from llmos.kernel.dispatcher import Dispatcher, Sent
from llmos.kernel.table import Connection, Lane, Table

NOW = 1_000_000
BODY = codec.encode(bytes(150))
METHODS = ["models.chat", "models.complete", "models.list", "scheduler.submit", "echo.echo"]


class Net:
    """A dispatcher whose sending is free, one service, and ``clients`` connections that may call it."""

    def __init__(self, clients: int) -> None:
        self.table = Table(["echo"])
        self.dispatcher = Dispatcher(self.table, lambda to, frames: Sent.OK)
        self.echo = self.open(Grant(principal="echo", tenant="system", serves="echo"))
        self.echo.service = "echo"
        self.table.services["echo"].data = self.echo
        grant = Grant(principal="user", tenant="local", calls=METHODS, models=["*"])
        self.clients = [self.open(grant) for _ in range(clients)]

    def open(self, grant: Grant) -> Connection:
        rid = len(self.table.connections).to_bytes(5, "big")
        connection = self.table.open(Lane.DATA, rid, 1, "peer", NOW)
        self.table.grant(connection, 0, grant)
        return connection

    def call(self, sender: Connection, id: int) -> None:
        head = header.encode(Header(VERSION, Kind.CALL, "echo", "echo", id, 0, 0, 10 * NOW))
        self.dispatcher.dispatch(sender, [head, BODY], NOW)


@pytest.mark.parametrize("clients", [1, 1000])
def test_a_call_and_its_reply(benchmark: BenchmarkFixture, clients: int) -> None:
    net = Net(clients)
    user = net.clients[-1]
    call = header.encode(Header(VERSION, Kind.CALL, "echo", "echo", 7, 0, 0, 10 * NOW))
    reply = header.encode(Header(VERSION, Kind.REPLY, user.number, "", 7))

    def turn() -> None:
        net.dispatcher.dispatch(user, [call, BODY], NOW)
        net.dispatcher.dispatch(net.echo, [reply, BODY], NOW)

    benchmark(turn)
    assert not user.calls
    assert net.table.messages["answer"] == net.table.messages["call"] > 0


def test_a_chunk_of_a_stream(benchmark: BenchmarkFixture) -> None:
    net = Net(1)
    user = net.clients[0]
    net.call(user, 7)
    chunk = header.encode(Header(VERSION, Kind.CHUNK, user.number, "", 7))
    benchmark(lambda: net.dispatcher.dispatch(net.echo, [chunk, BODY], NOW))
    assert user.calls


def test_a_refused_call(benchmark: BenchmarkFixture) -> None:
    net = Net(1)
    call = header.encode(Header(VERSION, Kind.CALL, "echo", "forbidden", 7))
    benchmark(lambda: net.dispatcher.dispatch(net.clients[0], [call, BODY], NOW))
    assert net.table.errors["EACCES"] > 0


def test_a_tick_over_1000_connections_with_10_calls_each(benchmark: BenchmarkFixture) -> None:
    net = Net(1000)
    for client in net.clients:
        for id in range(1, 11):
            net.call(client, id)
    benchmark(lambda: net.dispatcher.tick(NOW))
    assert len(net.echo.serving) > 0


def test_a_death_with_1000_calls_outstanding(benchmark: BenchmarkFixture) -> None:
    def setup() -> tuple[tuple[Net], dict[str, object]]:
        net = Net(100)
        for client in net.clients:
            for id in range(1, 11):
                net.call(client, id)
        return (net,), {}

    benchmark.pedantic(lambda net: net.dispatcher.close(net.echo), setup=setup, rounds=20)

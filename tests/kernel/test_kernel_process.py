"""The kernel as a process: registration, death, restart, and peers that misbehave on the wire."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from llmos.ipc import codec, header, paths
from llmos.ipc.errors import AccessDenied, HostDown, InvalidArgument, TimedOut
from llmos.ipc.grant import Grant
from llmos.ipc.header import VERSION, Header, Kind
from llmos.ipc.server import Incoming, Later, Server, method
from tests.conftest import System, wait_until

USER = Grant(
    principal="user", tenant="local", calls=["echo.*", "kernel.names", "kernel.stats", "kernel.trace"]
)
GRANTS = {"echo": Grant(principal="echo", tenant="system", serves="echo"), "user": USER}


class Echo(Server):
    name = "echo"

    @method
    def say(self, request: str, call: Incoming) -> str:
        return f"{call.origin.grant.tenant}: {request}"

    @method
    def count(self, request: int, call: Incoming) -> Later:
        for number in range(request):
            call.chunk(number)
        call.end(request)
        return Later()

    @method
    def never(self, request: None, call: Incoming) -> Later:
        call.on_cancel = self.cancelled
        return Later()

    def start(self) -> None:
        self.cancels = 0

    def cancelled(self) -> None:
        self.cancels += 1


@contextmanager
def raw_peer(system: System, name: str, routing_id: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """A DEALER that sends what it likes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        if routing_id:
            socket.set(zmq.ROUTING_ID, routing_id)
        socket.connect(paths.socket_address(name, system.run))
        yield socket


@pytest.fixture
def echo(system: Callable[[dict[str, Grant]], System]) -> System:
    net = system(GRANTS)
    net.kernel()
    net.serve(Echo(net.run))
    net.wait_ready("echo")
    return net


def test_a_call_carries_the_callers_tenant(echo: System) -> None:
    assert echo.client().call("echo.say", "hi") == "local: hi"


def test_a_stream_yields_its_chunks_then_its_end(echo: System) -> None:
    assert list(echo.client().stream("echo.count", 3)) == [0, 1, 2, 3]


def test_leaving_a_stream_cancels_it(echo: System) -> None:
    server = echo._threads[0][0]
    assert isinstance(server, Echo)
    stream = echo.client().stream("echo.never")
    with pytest.raises(TimedOut):
        next(echo.client().stream("echo.never", timeout=0.05))
    stream.close()
    wait_until(lambda: server.cancels == 1, what="the cancel")


def test_a_wrong_body_is_named(echo: System) -> None:
    with pytest.raises(InvalidArgument, match="Expected `str`"):
        echo.client().call("echo.say", 7)


def test_a_bad_token_is_refused_where_security_is_down(echo: System) -> None:
    paths.write_private(paths.token_path("bad", echo.run), b"no such token")
    with pytest.raises(HostDown, match="security is not running"):
        echo.client("bad")


def test_a_dead_service_ends_its_calls_at_once(system: Callable[[dict[str, Grant]], System]) -> None:
    net = system(GRANTS)
    net.kernel()
    process = net.spawn("echo", "tests.kernel.echo_process")
    net.wait_ready("echo")
    stream = net.client().stream("echo.never")
    client = net.client()
    assert client.call("echo.say", "hi") == "local: hi"
    failure: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except HostDown as error:
            failure.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: client.call("kernel.names")["names"][1]["outstanding"] == 1, what="the call")
    process.kill()
    process.wait()
    thread.join(5)
    assert failure
    net.processes.pop("echo")
    net.spawn("echo2", "tests.kernel.echo_process")
    assert client.call("echo.say", "again") == "local: again", (
        "a call waits for a service that is coming back"
    )


def test_services_and_clients_outlive_the_kernel(echo: System) -> None:
    client = echo.client()
    assert client.call("echo.say", "before") == "local: before"
    kernel = echo.processes.pop("kernel")
    kernel.kill()
    kernel.wait()
    echo.kernel()

    def answers() -> bool:
        try:
            return bool(client.call("echo.say", "after") == "local: after")
        except HostDown:  # it was sent before the loss of the old kernel was noticed
            return False

    wait_until(answers, what="an answer through the new kernel")


def test_a_peer_that_chooses_its_own_routing_id_is_not_served(echo: System) -> None:
    hello = header.encode(Header(VERSION, Kind.KERNEL, "", "hello", 1))
    token = paths.read_token("user", echo.run)
    for routing_id, served in ((b"", True), (b"echo", False)):
        with raw_peer(echo, "kernel", routing_id) as socket:
            socket.send_multipart([hello, codec.encode({"token": token})])
            assert bool(socket.poll(2000 if served else 200)) == served


def test_who_has_not_said_hello_is_refused(echo: System) -> None:
    with raw_peer(echo, "kernel") as socket:
        call = header.encode(Header(VERSION, Kind.CALL, "echo", "say", 1))
        socket.send_multipart([call, codec.encode("hi")])
        assert socket.poll(2000)
        assert isinstance(codec.decode_error(socket.recv_multipart()[1]), AccessDenied)


@pytest.mark.parametrize("name", ["kernel", "control"])
def test_garbage_disturbs_nobody(echo: System, name: str) -> None:
    rng = random.Random(1)
    good, bad = echo.client(), echo.client()
    with raw_peer(echo, name) as socket:
        for _ in range(300):
            frames = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 20))]
            socket.send_multipart(frames)
            # A valid header with a body that is none reaches the service itself.
            call = header.encode(Header(VERSION, Kind.CALL, "echo", "say", rng.randrange(1 << 40)))
            bad._link.wire.send([call, frames[0]])
        assert good.call("echo.say", "still here") == "local: still here"


def test_sockets_and_tokens_are_ours_alone(echo: System) -> None:
    for path in (echo.run / "kernel.sock", echo.run / "control.sock", paths.token_path("user", echo.run)):
        assert os.stat(path).st_mode & 0o077 == 0

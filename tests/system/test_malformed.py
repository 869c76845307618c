"""Malformed messages at the sockets of the running system: nobody crashes, and a good client works on."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.ipc import codec, header, limits, paths
from llmos.ipc.errors import LLMOSError
from llmos.ipc.header import VERSION, Header, Kind
from llmos.kernel.messages import Hello
from llmos.services.manifest import DEFAULT_MODEL
from tests.conftest import wait_until

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(600)]

SOCKETS = ("kernel", "control")
SERVICES = ("security", "memory", "scheduler", "models", "monitor", "gateway", "driver.jax0", "kernel", "")
METHODS = (
    "models.chat", "models.complete", "models.list", "models.load", "models.tokenize", "models.detokenize",
    "models.embed", "models.rerank", "scheduler.encode",
    "scheduler.submit", "scheduler.tasks", "scheduler.kill", "scheduler.stats", "memory.usage",
    "monitor.snapshot", "kernel.names", "kernel.trace", "security.mint", "security.revoke",
)  # fmt: skip

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
numbers = st.integers(-(1 << 63), (1 << 64) - 1)
peers = st.sampled_from(SERVICES) | st.text(max_size=20) | numbers
# Headers that are right in most elements, so that they come further than the first check.
headers = st.tuples(
    st.just(VERSION) | numbers, st.integers(0, 10) | numbers, peers, st.text(max_size=20), numbers,
    st.just(0) | numbers, numbers, numbers, st.none() | st.tuples(numbers, numbers),
).map(codec.encode)  # fmt: skip
damaged = st.tuples(headers, st.integers(0, 40), st.binary(max_size=4)).map(
    lambda parts: parts[0][: parts[1]] + parts[2]
)
frames = st.binary(max_size=80) | headers | damaged | values.map(codec.encode)
messages = st.lists(frames, min_size=1, max_size=limits.FRAMES + 4)
exhaustive = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


class Guard:
    """A good client that calls all the time, from a thread of its own."""

    def __init__(self, up: Any) -> None:
        self._up = up
        self._stopped = threading.Event()
        self.failures: list[str] = []
        self.answers = 0
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def wait(self) -> None:
        """Wait for one more answer to a question that is asked from now on."""
        seen = self.answers
        wait_until(
            lambda: self.answers > seen + 1 or bool(self.failures), what="an answer to the good client"
        )

    def _work(self) -> None:
        with self._up.client() as client:
            while not self._stopped.is_set():
                try:
                    client.call("models.list", timeout=10.0)
                    self.answers += 1
                except LLMOSError as error:
                    self.failures.append(str(error))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


@pytest.fixture
def unharmed(up: Any) -> Iterator[None]:
    """After the test no process was restarted, a good client was answered throughout, and a chat works."""
    before = {process.name: process.pid for process in up.status().processes}
    guard = Guard(up)
    try:
        guard.wait()
        yield
        guard.wait()
    finally:
        guard.stop()
    assert guard.failures == []
    assert {process.name: process.pid for process in up.status().processes} == before
    answer = up.openai().chat.completions.create(
        model=DEFAULT_MODEL, max_tokens=4, messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.usage.completion_tokens > 0


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


def dealer(context: Any, up: Any, name: str) -> Any:
    made = context.socket(zmq.DEALER)
    made.set(zmq.LINGER, 0)
    made.set(zmq.SNDTIMEO, 5000)
    made.connect(paths.socket_address(name, up.run))
    return made


def greeted(context: Any, up: Any, name: str = "kernel") -> Any:
    """A connection that holds the local user's capability."""
    made = dealer(context, up, name)
    hello = Hello(paths.read_token("user", up.run), control=name == "control")
    made.send_multipart([header.encode(Header(VERSION, Kind.KERNEL, "", "hello", 1)), codec.encode(hello)])
    assert made.poll(5000), "no welcome"
    made.recv_multipart()
    return made


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("known", [False, True], ids=["stranger", "user"])
def test_any_frames(up: Any, context: Any, known: bool) -> None:
    peers = [greeted(context, up) if known else dealer(context, up, name) for name in SOCKETS]

    @exhaustive
    @given(messages)
    def send(message: list[bytes]) -> None:
        for peer in peers:
            peer.send_multipart(message)
            while peer.poll(0):
                peer.recv_multipart()

    send()
    for peer in peers:
        peer.close()


@pytest.mark.usefixtures("unharmed")
def test_any_body_for_any_method_that_the_user_may_call(up: Any, context: Any) -> None:
    peer, ids = greeted(context, up), iter(range(2, 1 << 30))
    wrong: list[tuple[str, bytes]] = []

    @exhaustive
    @given(st.sampled_from(METHODS), st.binary(max_size=60) | values.map(codec.encode))
    def call(target: str, body: bytes) -> None:
        service, _, method = target.rpartition(".")
        id = next(ids)
        peer.send_multipart([header.encode(Header(VERSION, Kind.CALL, service, method, id)), body])
        kind = Kind.CHUNK
        while kind == Kind.CHUNK:
            assert peer.poll(10_000), f"{target} never answered {body!r}"
            head, *_ = peer.recv_multipart()
            answer = header.decode(head)
            kind = Kind(answer.kind)
        if answer.id != id:
            wrong.append((target, body))

    call()
    peer.close()
    assert wrong == []


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", SOCKETS)
def test_bytes_that_are_no_zeromq(up: Any, name: str) -> None:
    rng = random.Random(7)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    openings = [b"GET / HTTP/1.1\r\n\r\n", greeting, greeting[:20], b"\xff" * 200, b""]
    for number in range(60):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(5.0)
            peer.connect(str(up.run / f"{name}.sock"))
            try:
                peer.sendall(openings[number % len(openings)] + rng.randbytes(rng.randrange(2000)))
            except ConnectionError:
                continue


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", SOCKETS)
def test_frames_that_are_too_large_too_many_or_too_deep(up: Any, context: Any, name: str) -> None:
    call = header.encode(Header(VERSION, Kind.CALL, "models", "chat", 5))
    deep = b"\x91" * 200_000 + b"\x00"
    for message in (
        [os.urandom(1 << 20), b""],
        [call, os.urandom(4 << 20)],
        [call, *[b""] * 1000],
        [deep, deep],
        [call, deep],
        [call, b"\xdd\xff\xff\xff\xff"],
        [call, b"\xdf\xff\xff\xff\xff"],
        [call, b"\xc6\xff\xff\xff\xff"],
        [call],
        [b""],
        [b"", b"", b""],
    ):
        for peer in (dealer(context, up, name), greeted(context, up)):
            peer.send_multipart(message)
            peer.poll(50)
            peer.close()


@pytest.mark.usefixtures("unharmed")
def test_peers_that_come_and_go(up: Any, context: Any) -> None:
    for number in range(200):
        peer = greeted(context, up) if number % 4 == 0 else dealer(context, up, SOCKETS[number % 2])
        call = header.encode(Header(VERSION, Kind.CALL, "models", "list", number + 2))
        peer.send_multipart([call, codec.EMPTY])
        peer.close()

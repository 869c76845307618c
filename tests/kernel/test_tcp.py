"""The kernel's tcp socket, from the attacker's side: nobody without an admitted CURVE key gets a word in."""

from __future__ import annotations

import socket as plain
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import zmq

from llmos.ipc import codec, paths
from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, HostDown, InvalidArgument
from llmos.ipc.grant import Grant
from llmos.ipc.sockets import CurveClient, check_address
from llmos.kernel.messages import BootFile, Tcp
from tests.conftest import System
from tests.kernel.test_kernel_process import GRANTS, Echo


def free_port() -> int:
    with plain.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Remote:
    """A kernel that listens on tcp, and the keys of a peer it admits."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.public, secret = zmq.curve_keypair()
        self.admitted = paths.private_dir(system.run / "authorized")
        self.peer = self.new_keys("laptop")
        boot = codec.decode((system.run / "boot").read_bytes(), BootFile)
        tcp = Tcp(self.address, self.public.decode(), secret.decode(), str(self.admitted))
        paths.write_private(system.run / "boot", codec.encode(msgspec.structs.replace(boot, tcp=tcp)))
        system.kernel()
        system.serve(Echo(system.run))
        system.wait_ready("echo")

    def new_keys(self, admit_as: str = "") -> CurveClient:
        public, secret = zmq.curve_keypair()
        if admit_as:
            paths.write_private(self.admitted / f"{admit_as}.pub", public)
        return CurveClient(self.public, public, secret)

    def connect(self, keys: CurveClient, token: str | None = None) -> Client:
        token = token if token is not None else paths.read_token("user", self.system.run)
        return Client(token, address=self.address, curve=keys, timeout=1.0)


@pytest.fixture
def remote(system: Callable[[dict[str, Grant]], System]) -> Remote:
    return Remote(system(GRANTS))


def test_an_admitted_peer_with_a_token_is_served(remote: Remote) -> None:
    with remote.connect(remote.peer) as client:
        assert client.call("echo.say", "hi") == "local: hi"


def test_a_key_that_was_not_admitted_gets_no_answer_even_with_a_good_token(remote: Remote) -> None:
    with pytest.raises(HostDown):
        remote.connect(remote.new_keys())


def test_an_admitted_key_is_no_right_by_itself(remote: Remote) -> None:
    with pytest.raises((AccessDenied, HostDown)):
        remote.connect(remote.peer, "no such token")


def test_a_peer_without_curve_gets_no_answer(remote: Remote) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(remote.address)
        with suppress(zmq.Again):  # the kernel may have closed the connection already
            socket.send_multipart([b"\x98", b"\xc0"], zmq.NOBLOCK)
        assert not socket.poll(300)


def test_taking_a_key_back_keeps_its_owner_out(remote: Remote) -> None:
    Path(remote.admitted / "laptop.pub").unlink()
    with pytest.raises(HostDown):
        remote.connect(remote.peer)


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://[::]:5555"])
def test_listening_everywhere_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="name one address"):
        check_address(address)

"""The gateway as a process: where it listens, how it starts and stops, and a kernel that is started anew."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import pytest

from llmos.ipc.errors import InvalidArgument, IOFailure
from llmos.kernel.messages import Stop
from llmos.services.gateway.server import bind, url
from llmos.services.manifest import GatewaySpec, Manifest
from tests.conftest import System, wait_until
from tests.services.gateway.conftest import GRANTS, FakeModels, FakeMonitor, FakeSecurity

ADA = {"Authorization": "Bearer key-ada"}
BOB = {"Authorization": "Bearer key-bob"}
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi you"}]}


@pytest.fixture
def process() -> Iterator[System]:
    system = System(Path(mkdtemp(prefix="llmos-t")), GRANTS)
    system.write_manifest(Manifest(gateway=GatewaySpec(port=0)))
    system.kernel()
    for kind in (FakeModels, FakeMonitor, FakeSecurity):
        system.serve(kind(system.run))
    system.spawn("gateway", "llmos.services.gateway")
    system.wait_ready("gateway", "models", "security", "monitor")
    yield system
    system.close()
    shutil.rmtree(system.run, ignore_errors=True)


def get(system: System, path: str, **more: Any) -> httpx.Response:
    with httpx.Client(base_url=(system.run / "gateway.url").read_text(), trust_env=False, timeout=20) as http:
        return http.request("POST" if "json" in more else "GET", path, **more)


def test_it_survives_a_restart_of_the_kernel(process: System) -> None:
    assert get(process, "/v1/models", headers=BOB).status_code == 200
    assert get(process, "/v1/models", headers=ADA).status_code == 200
    process.processes["kernel"].kill()
    process.processes["kernel"].wait()
    process.kernel()
    process.wait_ready("gateway", "models", "security", "monitor")
    answer = get(process, "/v1/chat/completions", json=CHAT, headers=ADA)
    assert answer.json()["choices"][0]["message"]["content"] == "hi you"
    assert get(process, "/healthz").status_code == 200
    assert get(process, "/v1/models", headers={"Authorization": "Bearer nonsense"}).status_code == 401


@pytest.mark.parametrize("how", ["kernel", "signal"])
def test_it_stops_when_told_to_and_leaves_nothing_behind(process: System, how: str) -> None:
    gateway, file = process.processes["gateway"], process.run / "gateway.url"
    assert file.stat().st_mode & 0o077 == 0
    if how == "kernel":
        process.client().call("kernel.stop", Stop("gateway"))
    else:
        gateway.send_signal(signal.SIGTERM)
    assert gateway.wait(10) == 0
    assert not file.exists()


def test_it_beats_with_its_progress(process: System) -> None:
    def line() -> Any:
        names = process.client().call("kernel.names")["names"]
        return next(each for each in names if each["name"] == "gateway")

    get(process, "/v1/chat/completions", json=CHAT, headers=ADA)
    wait_until(lambda: line()["progress"] >= 1 and 0 <= line()["beat_age"] < 5, what="a beat with progress")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "", "0"])
def test_an_address_that_means_every_interface_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgument, match=r"gateway\.host"):
        bind(host, 0)


def test_a_port_that_is_taken_is_told_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(IOFailure, match=r"gateway\.port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_free_port_is_taken_where_none_is_named() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"

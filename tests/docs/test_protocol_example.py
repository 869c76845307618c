"""The example in docs/protocol.md, run as it is printed: a client and a driver that know nothing of ours.

They use pyzmq and msgpack alone. The kernel, memory and the scheduler are the real processes, under a boot
file packed by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from llmos.drivers.sdk.server import DriverServer
from llmos.ipc import codec, header, limits
from llmos.ipc.header import Header, Kind
from llmos.ipc.server import Server
from llmos.kernel import methods, verbs
from llmos.services.memory.server import MemoryServer
from llmos.services.models.server import ModelsServer
from llmos.services.monitor.server import MonitorServer
from llmos.services.scheduler.server import Scheduler
from llmos.services.security.server import SecurityServer
from tests.conftest import wait_until

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\w+\.py): [^\n]*\n(.*?)```", PAGE, re.DOTALL))
SECONDS = 30.0

GRANTS: dict[str, dict[str, Any]] = {
    "memory": {"tenant": "system", "serves": "memory"},
    "scheduler": {"tenant": "system", "serves": "scheduler", "calls": ["memory.*", "driver.count0.*"]},
    "driver.count0": {"tenant": "system", "serves": "driver.count0"},
    "user": {
        "tenant": "local",
        "models": ["*"],
        "calls": ["kernel.names", "scheduler.*", "driver.count0.*"],
    },
}
MODEL = {"model": "count", "source": "", "slots": 2, "pages": 32, "page_tokens": 4, "max_context": 64}


class Machine:
    """A run folder and the processes in it, made without our own helpers."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (run / "tokens").mkdir(mode=0o700)
        entries = []
        for name, grant in GRANTS.items():
            token = os.urandom(16).hex()
            self.private(f"tokens/{name}", token.encode())
            digest = hashlib.sha256(token.encode()).hexdigest()
            entries.append({"digest": digest, "grant": {"principal": name, **grant}})
        self.private("boot", msgpack.packb({"entries": entries}))
        self.private("manifest", msgpack.packb({}))
        for name, source in PROGRAMS.items():
            (run / name).write_text(source)

    def private(self, name: str, data: bytes) -> None:
        path = self.run / name
        path.touch(mode=0o600)
        path.write_bytes(data)

    def environment(self, name: str) -> dict[str, str]:
        folders = {"LLMOS_RUN": str(self.run), "LLMOS_STATE": f"{self.run}/state"}
        return {**os.environ, **folders, "LLMOS_SERVICE": name}

    def start(self, name: str, *arguments: str) -> None:
        command = [sys.executable, *arguments]
        self.processes[name] = subprocess.Popen(command, env=self.environment(name))

    def run_client(self, source: str) -> str:
        path = self.run / "asked.py"
        path.write_text(source)
        done = subprocess.run(
            [sys.executable, str(path)],
            env=self.environment("user"),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait(10)


@pytest.fixture
def machine() -> Iterator[Machine]:
    run = Path(tempfile.mkdtemp(prefix="llmos-d"))
    made = Machine(run)
    made.start("kernel", "-m", "llmos.kernel")
    wait_until((run / "control.sock").exists, what="the kernel's sockets")
    made.start("memory", "-m", "llmos.services.memory")
    made.start("scheduler", "-m", "llmos.services.scheduler")
    made.start("driver.count0", str(run / "driver.py"))
    yield made
    made.close()
    shutil.rmtree(run)


def test_the_client_and_the_driver_of_the_page_work_with_the_real_kernel_and_scheduler(
    machine: Machine,
) -> None:
    # What the models service does: wait for the driver, have it load, tell the scheduler.
    load = {**MODEL, "chunk_tokens": 2}
    told = machine.run_client(f"""
import time
from wire import Connection, token
kernel = Connection("kernel", token("user"))
while True:
    [(_, names)] = kernel.call("kernel", "names", None)
    if {{"memory", "scheduler", "driver.count0"}} <= {{x["name"] for x in names["names"] if x["ready"]}}:
        break
    time.sleep(0.02)
*_, (_, loaded) = kernel.call("driver.count0", "load", {load!r})
list(kernel.call("scheduler", "host", {{"driver": "count0", "model": loaded}}))
try:
    list(kernel.call("driver.count0", "dance", None))
except RuntimeError as error:
    print(error)
""")
    assert told == "ENOSYS: no method dance\n"
    cut = machine.run_client("""
from wire import Connection, token
[(_, answer)] = Connection("kernel", token("user")).call("driver.count0", "preempt", {"quantum": 0})
print(answer)
""")
    assert cut == "{'quanta': []}\n"
    said = machine.run_client(PROGRAMS["client.py"]).splitlines()
    assert set(said[0].split()[1:]) == {"memory", "scheduler", "driver.count0"}
    tokens = [token for line in said[1:-1] for token in line.partition(": ")[2].split()]
    assert tokens == ["4", "5", "6", "7", "8"]
    assert said[-1] == "ended by length after 5"


def test_the_driver_of_the_page_leaves_when_its_kernel_is_gone(machine: Machine) -> None:
    wait_until(lambda: "driver.count0" in _ready(machine), what="the driver")
    kernel = machine.processes.pop("kernel")
    kernel.kill()
    kernel.wait()
    machine.start("kernel", "-m", "llmos.kernel")
    driver = machine.processes.pop("driver.count0")
    assert driver.wait(SECONDS) == 0


def _ready(machine: Machine) -> str:
    return machine.run_client("""
from wire import Connection, token
[(_, names)] = Connection("kernel", token("user")).call("kernel", "names", None)
print(*(line["name"] for line in names["names"] if line["ready"]))
""")


def test_the_bytes_on_the_page_are_the_bytes_on_the_wire() -> None:
    """Lines such as ``frame 0  99 01 08 …`` under a heading that says what they hold."""
    shown = [bytes.fromhex(line) for line in re.findall(r"^frame \d +([0-9a-f ]+?)(?:  .*)?$", PAGE, re.M)]
    grant = {"principal": "user", "tenant": "local", "calls": ["echo.say"]}
    expected = [
        header.encode(Header(1, Kind.KERNEL, "", "hello", 1)),
        codec.encode({"token": "s3cret", "control": False}),
        header.encode(Header(1, Kind.REPLY, 7, "", 1)),
        header.encode(Header(1, Kind.CALL, "echo", "say", 2)),
        codec.encode("hi"),
        header.encode(Header(1, Kind.CALL, "echo", "say", 2)),
        codec.encode("hi"),
        codec.encode([7, grant]),
        header.encode(Header(1, Kind.REPLY, 7, "", 2)),
        codec.encode("hi to you"),
        header.encode(Header(1, Kind.ERROR, 7, "", 3)),
    ]
    assert shown == expected


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in vars(limits).items() if n.isupper()])
def test_every_limit_is_on_the_page(name: str, value: int) -> None:
    assert re.search(rf"^\| `{name}` \| {value:,} ", PAGE, re.M), f"{name} is {value:,}"


@pytest.mark.parametrize("name", sorted([*verbs.VERBS, *(f"kernel.{name}" for name in methods.METHODS)]))
def test_every_verb_and_method_of_the_kernel_is_on_the_page(name: str) -> None:
    assert re.search(rf"^\| `{re.escape(name)}` \|", PAGE, re.M)


SERVERS: dict[str, type[Server]] = {
    "memory": MemoryServer,
    "scheduler": Scheduler,
    "models": ModelsServer,
    "monitor": MonitorServer,
    "security": SecurityServer,
    "driver.NAME": DriverServer,
}


@pytest.mark.parametrize(
    "name",
    sorted(
        f"{service}.{name}"
        for service, server in SERVERS.items()
        for name, value in vars(server).items()
        if hasattr(value, "__llmos_method__")
    ),
)
def test_every_method_of_every_service_is_on_the_page(name: str) -> None:
    assert re.search(rf"^\| `{re.escape(name)}` \|", PAGE, re.M)

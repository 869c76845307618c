"""A private system for a test: its own run, state and cache folders, a real kernel process, real sockets."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmos.ipc import codec, paths
from llmos.ipc.client import Client
from llmos.ipc.grant import Grant
from llmos.ipc.server import Server
from llmos.kernel.messages import BootEntry, BootFile
from llmos.services import manifest
from llmos.services.manifest import Manifest

BOOT_SECONDS = 20.0


def wait_until(condition: Callable[[], bool], seconds: float = BOOT_SECONDS, what: str = "condition") -> None:
    """Wait until a condition holds; fails the test with ``what`` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come about within {seconds:g} s")
        time.sleep(0.01)


class System:
    """Real processes on real sockets, with exactly the grants a test gives."""

    def __init__(self, run: Path, grants: dict[str, Grant]) -> None:
        self.run = run
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._threads: list[tuple[Server, threading.Thread]] = []
        self._clients: list[Client] = []
        self.env = {
            **os.environ,
            "LLMOS_RUN": str(run),
            "LLMOS_STATE": str(run / "state"),
            "LLMOS_CACHE": str(run / "cache"),
        }
        paths.private_dir(run / "tokens")
        entries = []
        for name, grant in grants.items():
            token = f"boot-{name}-{os.urandom(8).hex()}"
            paths.write_private(paths.token_path(name, run), token.encode())
            entries.append(BootEntry(hashlib.sha256(token.encode()).hexdigest(), grant))
        paths.write_private(run / "boot", codec.encode(BootFile(entries)))
        self.write_manifest(Manifest())

    def write_manifest(self, value: Manifest) -> None:
        manifest.write_running(value, self.run)

    def spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start ``python -m`` of a module as a process of this system."""
        process = subprocess.Popen([sys.executable, "-m", *command], env=self.env)
        self.processes[name] = process
        return process

    def kernel(self) -> None:
        self.spawn("kernel", "llmos.kernel")
        wait_until((self.run / "kernel.sock").exists, what="the kernel's socket")

    def serve(self, server: Server) -> Server:
        """Run a server of the test's own in a thread."""
        thread = threading.Thread(target=server.serve, daemon=True)
        self._threads.append((server, thread))
        thread.start()
        return server

    def client(self, name: str = "user", timeout: float = BOOT_SECONDS) -> Client:
        client = Client(paths.read_token(name, self.run), run=self.run, timeout=timeout)
        self._clients.append(client)
        return client

    def wait_ready(self, *names: str) -> None:
        """Wait until services have said that they are ready."""
        with Client(paths.read_token("user", self.run), run=self.run, timeout=BOOT_SECONDS) as client:

            def ready() -> bool:
                lines = client.call("kernel.names")["names"]
                return set(names) <= {line["name"] for line in lines if line["ready"]}

            wait_until(ready, what=f"{names} ready")

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for server, thread in self._threads:
            server.finish()
            thread.join(5)
            assert not thread.is_alive(), f"{server.service} does not stop"
        for name, process in reversed(self.processes.items()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                pytest.fail(f"{name} does not stop on SIGTERM")


@pytest.fixture
def system() -> Iterator[Callable[[dict[str, Grant]], System]]:
    """Makes systems; whatever was started is stopped after the test. The folder's path is short: sockets."""
    made: list[System] = []

    def make(grants: dict[str, Grant]) -> System:
        run = Path(tempfile.mkdtemp(prefix="llmos-t"))
        made.append(System(run, grants))
        return made[-1]

    yield make
    for each in made:
        each.close()
        shutil.rmtree(each.run, ignore_errors=True)

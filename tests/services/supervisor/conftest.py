"""A running system of fake services, under the real kernel and the real supervisor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmos.ipc.client import Client
from llmos.services.supervisor import status
from llmos.services.supervisor.status import ProcessStatus, Status

PROGRAM = str(Path(__file__).parent / "fakes" / "system.py")
PATIENCE = 30.0


class System:
    """A supervisor that was started with some fakes, and what can be seen of it."""

    def __init__(self, folder: Path, services: tuple[str, ...]) -> None:
        self.run, self.state = folder / "run", folder / "state"
        self.environment = {
            **os.environ,
            "LLMOS_RUN": str(self.run),
            "LLMOS_STATE": str(self.state),
            "LLMOS_CACHE": str(folder / "cache"),
        }
        self.supervisor = self.spawn(*services)

    def spawn(self, *services: str) -> subprocess.Popen[str]:
        """A supervisor on this run folder."""
        return subprocess.Popen(
            [sys.executable, PROGRAM, *services],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, condition: Callable[[Status], bool]) -> Status:
        """Wait until the status is as it should be."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.supervisor.poll() is None:
            current = status.read(self.run)
            if current is not None and current.pid == self.supervisor.pid and condition(current):
                return current
            time.sleep(0.02)
        words = self.supervisor.communicate()[1] if self.supervisor.poll() is not None else "still running"
        raise AssertionError(f"it did not come to that: {status.read(self.run)}; the supervisor: {words}")

    def ready(self) -> Status:
        return self.wait(lambda current: current.state == "ready")

    def process(self, name: str) -> ProcessStatus:
        current = status.read(self.run)
        assert current is not None
        return next(process for process in current.processes if process.name == name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.process(name).pid, number)

    def back(self, name: str, restarts: int) -> Status:
        """Wait until a process has been restarted so often, and all is well again."""
        return self.wait(
            lambda current: (
                current.state == "ready"
                and any(p.name == name and p.restarts == restarts for p in current.processes)
            )
        )

    def crash(self) -> None:
        """Kill the supervisor itself."""
        self.supervisor.kill()
        self.supervisor.wait()
        if self.supervisor.stderr is not None:
            self.supervisor.stderr.close()

    def stop(self) -> int:
        self.supervisor.send_signal(signal.SIGTERM)
        return self.supervisor.wait(PATIENCE)

    def client(self) -> Client:
        return Client(run=self.run, timeout=20.0)

    def pids(self) -> list[int]:
        current = status.read(self.run)
        assert current is not None
        return [process.pid for process in current.processes if process.pid]


@pytest.fixture
def launch() -> Iterator[Callable[..., System]]:
    """Start a system of the fakes that are named, as in ``launch("a", "b:stubborn")``."""
    # The path of a socket must be short, so not tmp_path.
    folder = Path(tempfile.mkdtemp(prefix="llmos-"))
    systems: list[System] = []

    def start(*services: str) -> System:
        systems.append(System(folder, services))
        return systems[-1]

    yield start
    for system in systems:
        system.crash()
    shutil.rmtree(folder)

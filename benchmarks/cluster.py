"""The processes that serve tokens, without HTTP and tokenizer: kernel, memory, scheduler and one driver."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from llmos.drivers.sdk.messages import LoadedModel, LoadProgress, LoadRequest
from llmos.ipc import codec, paths
from llmos.ipc.client import Client
from llmos.ipc.grant import Grant
from llmos.kernel.messages import BootEntry, BootFile
from llmos.services import manifest
from llmos.services.manifest import DriverSpec, Manifest, SchedulerSpec
from llmos.services.scheduler.messages import Host

DRIVER = "bench"
CALLS = ["scheduler.*", "memory.usage", "kernel.*", f"driver.{DRIVER}.load"]
GRANTS = {
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", f"driver.{DRIVER}.*"]
    ),
    f"driver.{DRIVER}": Grant(principal="driver", tenant="system", serves=f"driver.{DRIVER}"),
    "user": Grant(principal="user", tenant="user", models=["*"], band="realtime", calls=CALLS),
}
READY_SECONDS = 60.0


class Cluster:
    """Real processes in a folder of their own; use it in a ``with`` statement."""

    def __init__(self, driver: DriverSpec, steps: int = 8, grants: dict[str, Grant] | None = None) -> None:
        # Who is told to stop takes the processes along: a driver would go on holding its device.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self.run = Path(tempfile.mkdtemp(prefix="llmos-b"))
        self._write(driver, steps, grants or {})
        self._environment = {**os.environ, **driver.environment, "LLMOS_RUN": str(self.run)}
        self._processes = [self._spawn("llmos.kernel")]
        try:
            self._start()
        except BaseException:
            self._stop()
            raise

    def _start(self) -> None:
        wait_until((self.run / "kernel.sock").exists, "the kernel's socket")
        for service in ("memory", "scheduler"):
            self._processes.append(self._spawn(f"llmos.services.{service}"))
        self._processes.append(self._spawn("llmos.drivers.sdk", DRIVER))
        self.client = self.connect("user")
        wait_until(self._all_ready, "all services ready")

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(30)
        shutil.rmtree(self.run, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._stop()

    def connect(self, name: str) -> Client:
        """A client under one of the grants."""
        return Client(paths.read_token(name, self.run), run=self.run, timeout=3600)

    def load(self, request: LoadRequest) -> tuple[LoadedModel, float]:
        """Load a model and put it to work; (what was loaded, seconds)."""
        begun = time.perf_counter()
        phase = ""
        target = f"driver.{DRIVER}.load"
        for message in self.client.stream(target, request, LoadProgress, LoadedModel):
            if isinstance(message, LoadProgress) and message.phase != phase:
                phase = message.phase
                print(f"load: {phase} after {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        self.client.call("scheduler.host", Host(DRIVER, message))
        return message, time.perf_counter() - begun

    def _write(self, driver: DriverSpec, steps: int, grants: dict[str, Grant]) -> None:
        paths.private_dir(self.run / "tokens")
        entries = []
        for name, grant in {**GRANTS, **grants}.items():
            token = os.urandom(16).hex()
            paths.write_private(paths.token_path(name, self.run), token.encode())
            entries.append(BootEntry(hashlib.sha256(token.encode()).hexdigest(), grant))
        paths.write_private(self.run / "boot", codec.encode(BootFile(entries)))
        value = Manifest(drivers=[driver], models=[], scheduler=SchedulerSpec(steps=steps))
        manifest.write_running(value, self.run)

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *command], env=self._environment)

    def _all_ready(self) -> bool:
        lines = self.client.call("kernel.names")["names"]
        ready = {line["name"] for line in lines if line["ready"]}
        return {"memory", "scheduler", f"driver.{DRIVER}"} <= ready


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition of another process; RuntimeError after ``READY_SECONDS``."""
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {READY_SECONDS:g} s")
        time.sleep(0.02)

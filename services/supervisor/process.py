"""Starting one process, and ending it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmos.ipc import paths
from llmos.services.supervisor.plan import Process

LOG_BYTES = 8 << 20
INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "PYTHONPATH", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME", "LLMOS_LOG",
)  # fmt: skip
DEVICE_PREFIXES = (
    "JAX_", "XLA_", "CUDA_", "NVIDIA_", "NCCL_", "TPU_", "LIBTPU_", "OMP_", "MALLOC_", "LD_LIBRARY_PATH",
)  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """Where the system runs."""

    run: Path
    state: Path
    cache: Path

    @classmethod
    def current(cls) -> Folders:
        return cls(paths.run_dir().absolute(), paths.state_dir().absolute(), paths.cache_dir().absolute())

    def log(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"


def environment(process: Process, folders: Folders, inherited: Mapping[str, str]) -> dict[str, str]:
    """What a process is told by its environment: a short list, so that nobody's secrets come along."""
    kept = {name: value for name, value in inherited.items() if _wanted(name, process.devices)}
    own = {
        "LLMOS_RUN": str(folders.run),
        "LLMOS_STATE": str(folders.state),
        "LLMOS_CACHE": str(folders.cache),
        "LLMOS_SERVICE": process.name,
        "PYTHONFAULTHANDLER": "1",  # where it was goes to its log when it crashes, or hangs and is aborted
    }
    return {**kept, **process.environment, **own}


def _wanted(name: str, devices: bool) -> bool:
    return name in INHERITED or (devices and name.startswith(DEVICE_PREFIXES))


def open_log(path: Path) -> int:
    """A descriptor that appends to a log; one that has grown too long is first put aside, once."""
    paths.private_dir(path.parent)
    with suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def command_line(process: Process, parent: int) -> list[str]:
    """The arguments that start a process; never a secret among them, as everyone may read them."""
    target = ["exec", *process.command] if process.command else ["module", process.module]
    shim = "llmos.services.supervisor.child"
    # -P: the working folder is no place to import from.
    start = [sys.executable, "-P", "-m", shim, str(parent), process.name]
    return [*start, *target, *process.arguments]


class Child:
    """A running process, in a session of its own; the thread that makes it must live as long as it does."""

    def __init__(self, process: Process, folders: Folders) -> None:
        log = open_log(folders.log(process.name))
        try:
            self._popen = subprocess.Popen(
                command_line(process, os.getpid()),
                env=environment(process, folders, os.environ),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and those it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def owns(self, pid: int) -> bool:
        """Whether a process id is this one's, or of one that it started."""
        try:
            return pid == self.pid or os.getpgid(pid) == self.pid
        except ProcessLookupError:
            return False

    def reap(self) -> int:
        """The exit status of a process that has ended (negative: a signal); ends what it left behind."""
        # Before waiting: a dead leader still holds the group's number, so it cannot be anybody else's.
        self.signal(signal.SIGKILL)
        status = self._popen.wait()
        os.close(self.pidfd)
        return status


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"

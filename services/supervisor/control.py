"""Finding, starting and stopping a supervisor from outside: what the shell's ``up`` and ``down`` do."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.errors import Busy
from llmos.services.supervisor import files, lock
from llmos.services.supervisor.lock import RunLock
from llmos.services.supervisor.process import Folders, open_log

STOP_SECONDS = 60.0


def start(manifest: Path | None, *, follow: bool) -> subprocess.Popen[bytes]:
    """Start a supervisor in a session of its own; its words go to logs/supervisor.log.

    With ``follow`` it stops the system in order when the process that started it dies.
    """
    folders = Folders.current()
    paths.private_dir(folders.state)
    log = open_log(folders.log("supervisor"))
    command = [sys.executable, "-P", "-m", "llmos.services.supervisor"]
    command += ["--manifest", str(manifest.absolute())] if manifest is not None else []
    command += ["--follow", str(os.getpid())] if follow else []
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    finally:
        os.close(log)


def stop(run: Path, timeout: float = STOP_SECONDS) -> bool:
    """Stop the system of a run folder and wait until all of it is gone; False if none was up.

    A supervisor that does not stop within ``timeout`` seconds is killed, and its processes with it. What a
    killed one left behind is removed.
    """
    descriptor = _open_holder(run)
    if descriptor is not None:
        try:
            _end(descriptor, timeout)
        finally:
            os.close(descriptor)
    if run.is_dir():
        with suppress(Busy):  # somebody has just started another
            left = RunLock(run)
            files.clear(run)
            left.release()
    return descriptor is not None


def _open_holder(run: Path) -> int | None:
    """A descriptor of the supervisor's process; it cannot come to mean another one."""
    while (pid := lock.holder(run)) is not None:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            if lock.holder(run) == pid:
                return descriptor
            os.close(descriptor)
    return None


def _end(descriptor: int, timeout: float) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    for number, seconds in ((signal.SIGTERM, timeout), (signal.SIGKILL, timeout)):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
        if poller.poll(seconds * 1000):
            return

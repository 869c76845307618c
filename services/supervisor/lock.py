"""One supervisor per run folder.

A POSIX record lock on ``run/lock``: the system drops it when its holder dies, however it dies, and names the
holder to whoever asks, so no process id is ever read from a stale file. It is lost when *any* descriptor of
the file is closed by its holder: nothing but this module may open it there.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from llmos.ipc.errors import Busy

FILE = "lock"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


class RunLock:
    """The lock of this process on a run folder; Busy where another process holds it."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._descriptor = _acquire(run)

    def release(self) -> None:
        """Give the run folder up and remove the file."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _acquire(run: Path) -> int:
    path = run / FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise Busy(f"a system is up in {run} (process {holder(run)}); stop it by: llmos down") from None
        if _names(path, descriptor):
            return descriptor
        os.close(descriptor)  # the last holder removed the file between our opening and locking it


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def holder(run: Path) -> int | None:
    """The process that holds the lock of a run folder; for others than the holder itself."""
    try:
        descriptor = os.open(run / FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(descriptor)
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else pid

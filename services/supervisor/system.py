"""One system from lock to last file: what ``python -m llmos.services.supervisor`` runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.errors import AccessDenied
from llmos.ipc.grant import Grant
from llmos.services import manifest as manifests
from llmos.services.manifest import Manifest
from llmos.services.supervisor import files
from llmos.services.supervisor import grants as granting
from llmos.services.supervisor.lock import RunLock
from llmos.services.supervisor.loop import Supervisor
from llmos.services.supervisor.plan import Process, plan
from llmos.services.supervisor.process import Folders
from llmos.services.supervisor.restart import Policy


def supervise(path: Path | None, started: float) -> int:
    """Run what a manifest says, in the folders of the environment; ``started`` in Unix time."""
    manifest = manifests.load(path)
    granted = granting.boot_grants(manifest, granting.read_rights())
    return run_system(plan(manifest), granted, manifest, started)


def run_system(
    processes: Sequence[Process], granted: Mapping[str, Grant], manifest: Manifest, started: float
) -> int:
    """Run these processes under these grants until told to stop; nothing is left in the run folder.

    Raises Busy where another supervisor has the run folder, AccessDenied where others may enter a folder.
    """
    folders = Folders.current()
    paths.private_dir(folders.run)
    paths.private_dir(folders.state)
    _protected(folders.cache)
    paths.socket_address("control", folders.run)  # refuses a path that is too long for a socket
    lock = RunLock(folders.run)
    try:
        files.clear(folders.run)
        token = files.prepare(folders.run, manifest, granted)
        policy = Policy(manifest.restarts, manifest.restart_window)
        return Supervisor(processes, folders, policy, token, started).run()
    finally:
        files.clear(folders.run)
        lock.release()


def _protected(path: Path) -> None:
    """A folder that others may read, but not write: it holds programs that a driver will run."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise AccessDenied(f"{path} must be a folder of yours that only you may write: chmod 700 {path}")

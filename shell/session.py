"""The connection of the local user to the running system."""

from __future__ import annotations

from llmos.ipc import paths
from llmos.ipc.client import Client
from llmos.ipc.errors import HostDown
from llmos.services.supervisor import lock, status
from llmos.services.supervisor.status import Status

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0


def require_up() -> Status:
    """The status of the running system; HostDown where none is up."""
    run = paths.run_dir()
    current = status.read(run) if lock.holder(run) is not None else None
    if current is None:
        raise HostDown(f"no system is up in {run}; start one by: llmos up --detach")
    return current


def connect(timeout: float = CONNECT_SECONDS) -> Client:
    """A client under the local user's token; HostDown where no system is up."""
    require_up()
    return Client(timeout=timeout)

"""The file in which the supervisor says how things are: read by the shell and by the benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

State = Literal["waiting", "starting", "ready", "backoff", "failed", "stopping", "stopped"]
SystemState = Literal["starting", "ready", "degraded", "stopping"]

FILE = "status.json"
MAX_BYTES = 1 << 20


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process. ``spawned`` and ``ready`` are of its current run, in seconds since the supervisor started,
    -1 where that has not happened. ``exit`` says how its last run ended."""

    name: str
    state: State
    pid: int = 0
    spawned: float = -1.0
    ready: float = -1.0
    restarts: int = 0
    exit: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The system. ``started`` is the Unix time; ``phases`` holds the seconds from it to each milestone of the
    boot: "kernel", "services", "all"."""

    pid: int
    started: float
    state: SystemState
    processes: list[ProcessStatus]
    phases: dict[str, float] = {}


def write(run: Path, status: Status) -> None:
    """Replace the status in one step; not synced to disk, as it is worthless after a power failure."""
    temporary = run / f".{FILE}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(status))
    temporary.replace(run / FILE)


def read(run: Path) -> Status | None:
    """The latest status, or None where there is none."""
    try:
        with (run / FILE).open("rb") as file:
            return msgspec.json.decode(file.read(MAX_BYTES), type=Status)
    except (OSError, msgspec.DecodeError):
        return None

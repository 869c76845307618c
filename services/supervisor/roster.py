"""What is known of each process, and the events that change it. Times are seconds of a monotonic clock."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from llmos.kernel.messages import Name
from llmos.services.supervisor import health, restart
from llmos.services.supervisor.health import Seen
from llmos.services.supervisor.plan import Process
from llmos.services.supervisor.restart import Policy
from llmos.services.supervisor.status import ProcessStatus, State

log = logging.getLogger("llmos.supervisor")


class Running(Protocol):
    """A process that runs."""

    pid: int

    def owns(self, pid: int) -> bool: ...


C = TypeVar("C", bound=Running)


@dataclass
class Entry(Generic[C]):
    """One process: ``due`` is when it is to be started, if it is; ``exits`` when its runs ended."""

    process: Process
    child: C | None = None
    state: State = "waiting"
    due: float | None = None
    spawned: float = -1.0
    ready: float = -1.0
    restarts: int = 0
    exits: list[float] = field(default_factory=list)
    exit: str = ""
    seen: Seen | None = None

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for: it is ready, or never will be."""
        return self.state in ("ready", "failed", "stopped")

    def on_spawned(self, child: C, now: float) -> None:
        self.child, self.state, self.due, self.seen = child, "starting", None, None
        self.spawned, self.ready = now, -1.0

    def on_ready(self, now: float) -> None:
        self.state, self.ready = "ready", now
        log.info("%s is ready, %.2f s after its start", self.name, now - self.spawned)

    def on_exit(self, how: str, policy: Policy, now: float) -> None:
        """It ended by itself: start it again, later, or give it up."""
        self.child, self.exit, self.ready, self.seen = None, how, -1.0, None
        self.exits = [time for time in self.exits if time > now - policy.window] + [now]
        wait = restart.delay(self.exits, policy)
        if wait is None:
            self.state, self.due = "failed", None
            log.error(
                "%s is given up: it ended %d times within %g s, last by %s; its log says why",
                self.name, len(self.exits), policy.window, how,
            )  # fmt: skip
            return
        self.state, self.due = "backoff", now + wait
        self.restarts += 1
        log.warning("%s ended (%s); starting it again in %.2f s", self.name, how, wait)

    def on_line(self, line: Name, now: float) -> None:
        """Take in the line of this name; one of an earlier run says that this one is not known."""
        if self.child is None:
            return
        known = line.ready and line.connection > 0 and self.child.owns(line.pid)
        if self.state == "starting" and known:
            self.on_ready(now)
        if self.state == "ready":
            self.seen = health.observe(line if known else None, self.seen, now)

    def complaint(self, now: float) -> str:
        """Why it must be killed, or nothing."""
        if self.state == "starting" and now - self.spawned > self.process.start_limit:
            return f"not ready {self.process.start_limit:g} s after its start"
        return self.seen.reason if self.seen is not None and self.seen.stuck(now) else ""

    def status(self, epoch: float) -> ProcessStatus:
        """For the status file; ``epoch`` is when the supervisor started."""
        return ProcessStatus(
            name=self.name,
            state=self.state,
            pid=self.child.pid if self.child is not None else 0,
            spawned=_since(self.spawned, epoch),
            ready=_since(self.ready, epoch),
            restarts=self.restarts,
            exit=self.exit,
        )


def _since(time: float, epoch: float) -> float:
    return round(time - epoch, 4) if time >= 0 else -1.0

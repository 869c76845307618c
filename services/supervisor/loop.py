"""The supervisor's loop: start what is due, take in what ended and what the kernel says, act on it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

import zmq

from llmos.kernel.messages import Name
from llmos.services.supervisor import files, status, stopping
from llmos.services.supervisor.link import KernelLink
from llmos.services.supervisor.plan import DRIVER_STAGE, KERNEL, Process
from llmos.services.supervisor.process import Child, Folders, describe_exit
from llmos.services.supervisor.restart import Policy
from llmos.services.supervisor.roster import Entry
from llmos.services.supervisor.status import Status, SystemState

BOOT_POLL, WATCH_POLL = 0.02, 0.5
STAGE_SECONDS = 2.0  # how long a stage may hold the next one up
UNANSWERED_LIMIT = 2
DUMP_SECONDS = 1.0  # from SIGABRT, at which Python writes where it was to the log, to SIGKILL
log = logging.getLogger("llmos.supervisor")


class Supervisor:
    """Runs the processes of a plan in one run folder until it is told to stop. One thread."""

    def __init__(
        self, processes: Sequence[Process], folders: Folders, policy: Policy, token: str, started: float
    ) -> None:
        self._entries: list[Entry[Child]] = [Entry(process) for process in processes]
        self._by_name = {entry.name: entry for entry in self._entries}
        self._folders, self._policy, self._token = folders, policy, token
        self._epoch = time.monotonic() - (time.time() - started)
        self._started = started
        self._link: KernelLink | None = None
        self._phases: dict[str, float] = {}
        self._stage, self._stage_since = -1, 0.0
        self._next_names = 0.0
        self._stop_requests = 0
        self._leaving: list[Entry[Child]] | None = None
        self._asked: dict[str, tuple[float, stopping.Action]] = {}
        self._ending: dict[str, float] = {}
        self._kernel_failed = False
        self._written: Status | None = None
        self._wakeup, self._waker = socket.socketpair()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status is 1 if the kernel was given up, else 0."""
        self._catch_signals()
        try:
            while self._leaving is None or any(entry.child for entry in self._entries):
                self._turn()
        finally:
            for entry in self._entries:
                if entry.child is not None:
                    entry.child.signal(signal.SIGKILL)
                    entry.child.reap()
            if self._link is not None:
                self._link.close()
        return 1 if self._kernel_failed else 0

    def _catch_signals(self) -> None:
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_requests += 1

    def _turn(self) -> None:
        now = time.monotonic()
        if self._stop_requests and self._leaving is None:
            self._begin_stop()
        if self._leaving is None:
            self._open_stage(now)
            self._start_due(now)
        else:
            self._stop_next(self._leaving, now)
        self._write_status()
        self._poll(now)
        now = time.monotonic()
        self._take_exits(now)
        self._talk_to_kernel(now)
        self._end_stuck(now)

    # --- starting ---

    def _open_stage(self, now: float) -> None:
        """Make the next stage's processes due, when this one's have settled or had their time."""
        current = [e for e in self._entries if e.process.stage <= self._stage]
        held = self._stage >= 0 and now - self._stage_since < STAGE_SECONDS
        later = [e for e in self._entries if e.process.stage > self._stage]
        if not later or (held and not all(entry.settled for entry in current)):
            return
        self._stage, self._stage_since = min(e.process.stage for e in later), now
        for entry in later:
            if entry.process.stage == self._stage:
                entry.due = now

    def _start_due(self, now: float) -> None:
        for entry in self._entries:
            if entry.due is None or entry.due > now:
                continue
            try:
                child = Child(entry.process, self._folders)
            except OSError as error:
                self._on_exit(entry, f"could not start: {error.strerror}", now)
            else:
                entry.on_spawned(child, time.monotonic())

    # --- watching ---

    def _poll(self, now: float) -> None:
        """Wait until something happens or is due."""
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        for entry in self._entries:
            if entry.child is not None:
                poller.register(entry.child.pidfd, zmq.POLLIN)
        for source in self._link.sources if self._link is not None else ():
            poller.register(source, zmq.POLLIN)
        ready: dict[Any, int] = dict(poller.poll(max(0, round(self._wait(now) * 1000))))
        if self._wakeup.fileno() in ready:
            self._wakeup.recv(4096)

    def _wait(self, now: float) -> float:
        times = [entry.due for entry in self._entries if entry.due is not None]
        if self._leaving is not None or self._ending or not self._settled:
            times.append(now + BOOT_POLL)
        return min([*times, now + WATCH_POLL]) - now

    @property
    def _settled(self) -> bool:
        return all(entry.settled for entry in self._entries)

    def _take_exits(self, now: float) -> None:
        for entry in self._entries:
            if entry.child is None or not os.waitid(
                os.P_PID, entry.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                continue
            how = describe_exit(entry.child.reap())
            self._ending.pop(entry.name, None)
            if entry.name == KERNEL and self._link is not None:
                self._link.forget()
            if self._leaving is not None:
                entry.child, entry.state, entry.exit = None, "stopped", how
                asked = self._asked.get(entry.name)
                log.info("%s left (%s) after %.2f s", entry.name, how, now - asked[0] if asked else 0.0)
                continue
            self._on_exit(entry, how, now)

    def _on_exit(self, entry: Entry[Child], how: str, now: float) -> None:
        """Start it again by the policy; without a kernel there is no system."""
        entry.on_exit(how, self._policy, now)
        if entry.name == KERNEL and entry.state == "failed":
            self._kernel_failed = True
            self._stop_requests += 1

    def _talk_to_kernel(self, now: float) -> None:
        if self._link is None:
            if not files.kernel_listens(self._folders.run):
                return
            self._link = KernelLink(self._folders.run, self._token, self._take_names)
        self._link.turn()
        kernel = self._by_name[KERNEL]
        if kernel.state == "starting" and self._link.welcome:
            kernel.on_ready(now)
        if now >= self._next_names:
            self._next_names = now + (WATCH_POLL if self._settled else BOOT_POLL)
            self._link.ask_names()

    def _take_names(self, names: list[Name]) -> None:
        now = time.monotonic()
        for line in names:
            entry = self._by_name.get(line.name)
            if entry is not None:
                entry.on_line(line, now)
        self._note_phases(now)

    def _note_phases(self, now: float) -> None:
        milestones = {
            "kernel": [e for e in self._entries if e.name == KERNEL],
            "services": [e for e in self._entries if e.process.stage < DRIVER_STAGE],
            "all": self._entries,
        }
        for phase, entries in milestones.items():
            if phase not in self._phases and all(entry.state == "ready" for entry in entries):
                self._phases[phase] = round(max(entry.ready for entry in entries) - self._epoch, 4)

    def _end_stuck(self, now: float) -> None:
        """Kill what makes no progress; that it ended is then seen like any other end."""
        if self._leaving is not None:
            return
        for entry in self._entries:
            complaint = entry.complaint(now)
            if entry.name == KERNEL and self._link is not None and self._link.unanswered >= UNANSWERED_LIMIT:
                complaint = "it does not answer"
            if not complaint or entry.child is None:
                continue
            since = self._ending.setdefault(entry.name, now)
            if since == now:
                log.error("%s is stuck (%s): ending it", entry.name, complaint)
                entry.child.signal(signal.SIGABRT)
            elif now - since >= DUMP_SECONDS:
                entry.child.signal(signal.SIGKILL)

    # --- stopping ---

    def _begin_stop(self) -> None:
        log.info("stopping")
        self._leaving = list(reversed(self._entries))
        for entry in self._entries:
            entry.due = None
            entry.state = "stopping" if entry.child is not None else "stopped"

    def _stop_next(self, leaving: list[Entry[Child]], now: float) -> None:
        """See to it that the last one started leaves; the one before it is asked when it has."""
        while leaving and leaving[0].child is None:
            leaving.pop(0)
        if not leaving:
            return
        entry = leaving[0]
        assert entry.child is not None
        since, done = self._asked.get(entry.name, (now, None))
        # The kernel itself has nobody who would ask it.
        can_ask = self._link is not None and self._link.welcome and entry.name != KERNEL and entry.ready >= 0
        action = stopping.action(now - since, can_ask=can_ask, hurry=self._stop_requests > 1)
        if action == done:
            return
        self._asked[entry.name] = (since, action)
        if action == "ask" and self._link is not None:
            self._link.stop(entry.name)
        elif action == "terminate":
            entry.child.signal(signal.SIGTERM)
        elif action == "kill":
            log.warning("%s did not leave: killing it", entry.name)
            entry.child.signal(signal.SIGKILL)

    # --- telling ---

    def _write_status(self) -> None:
        current = Status(
            pid=os.getpid(),
            started=self._started,
            state=self._system_state(),
            processes=[entry.status(self._epoch) for entry in self._entries],
            phases=dict(self._phases),
        )
        if current != self._written:
            status.write(self._folders.run, current)
            self._written = current

    def _system_state(self) -> SystemState:
        states = {entry.state for entry in self._entries}
        if self._leaving is not None:
            return "stopping"
        if states == {"ready"}:
            return "ready"
        started_once = "all" in self._phases
        return "degraded" if "failed" in states or started_once else "starting"

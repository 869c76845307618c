"""What a process goes through, told by events."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.kernel.messages import Name
from llmos.services.supervisor.plan import Process
from llmos.services.supervisor.restart import Policy
from llmos.services.supervisor.roster import Entry

POLICY = Policy(restarts=1, window=60.0)


@dataclass
class FakeChild:
    pid: int

    def owns(self, pid: int) -> bool:
        return pid == self.pid


def started(pid: int = 10) -> Entry[FakeChild]:
    entry: Entry[FakeChild] = Entry(Process(name="memory", start_limit=5.0))
    entry.on_spawned(FakeChild(pid), 1.0)
    return entry


def line(pid: int, *, ready: bool = True, beat_age: float = 0.1) -> Name:
    return Name("memory", 3, pid, ready, 0, beat_age, 0, 15.0)


def test_it_is_ready_when_the_kernel_says_so_of_this_very_process() -> None:
    entry = started()
    entry.on_line(line(9), 1.5)
    assert entry.state == "starting"
    entry.on_line(line(10, ready=False), 1.6)
    assert entry.state == "starting"
    entry.on_line(line(10), 2.0)
    assert (entry.state, entry.ready) == ("ready", 2.0)


def test_the_end_of_a_process_is_answered_by_a_restart_and_then_by_giving_up() -> None:
    entry = started()
    entry.on_exit("killed by SIGKILL", POLICY, 10.0)
    assert (entry.state, entry.due, entry.restarts) == ("backoff", 10.0, 1)
    entry.on_spawned(FakeChild(11), 10.0)
    entry.on_exit("exit status 1", POLICY, 11.0)
    assert (entry.state, entry.due, entry.exit) == ("failed", None, "exit status 1")
    assert entry.settled


def test_one_that_never_registers_is_complained_about() -> None:
    entry = started()
    assert not entry.complaint(5.9)
    assert "not ready" in entry.complaint(6.1)


def test_one_that_stopped_beating_is_complained_about_when_it_is_certain() -> None:
    entry = started()
    entry.on_line(line(10), 2.0)
    entry.on_line(line(10, beat_age=16.0), 18.0)
    assert not entry.complaint(18.0)
    entry.on_line(line(10, beat_age=19.0), 21.0)
    assert "no heartbeat" in entry.complaint(21.0)


def test_a_new_run_starts_with_a_clean_record() -> None:
    entry = started()
    entry.on_line(line(10), 2.0)
    entry.on_line(line(10, beat_age=16.0), 18.0)
    entry.on_exit("killed by SIGABRT", POLICY, 22.0)
    entry.on_spawned(FakeChild(11), 22.0)
    assert not entry.complaint(25.0)


def test_times_are_told_from_the_start_of_the_supervisor() -> None:
    entry = started()
    entry.on_line(line(10), 2.0)
    status = entry.status(0.5)
    assert (status.pid, status.spawned, status.ready) == (10, 0.5, 1.5)

"""The supervisor with real processes: they come up, come back, and leave nothing."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import TimedOut
from llmos.kernel.messages import Name, Names
from llmos.services.supervisor import control, lock

pytestmark = pytest.mark.system

Launch = Callable[..., Any]
FAKE_LIMIT = 1.0


def line(client: Client, name: str) -> Name:
    """The line of a service in the kernel's name table."""
    return next(line for line in client.call("kernel.names", None, Names).names if line.name == name)


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within a while."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended = bool(select.select([descriptor], [], [], 5.0)[0])
    os.close(descriptor)
    return ended


def test_everything_becomes_ready_and_answers(launch: Launch) -> None:
    system = launch("a", "b", "driver.x")
    current = system.ready()
    assert [process.name for process in current.processes] == ["kernel", "a", "b", "driver.x"]
    assert 0 < current.phases["kernel"] <= current.phases["services"] <= current.phases["all"]
    with system.client() as client:
        for name in ("a", "b", "driver.x"):
            assert client.call(f"{name}.pid") == system.process(name).pid
        names = client.call("kernel.names", None, Names).names
    assert {line.name for line in names if line.ready} == {"a", "b", "driver.x"}


def test_drivers_start_when_the_services_are_ready(launch: Launch) -> None:
    current = launch("a", "driver.x").ready()
    processes = {process.name: process for process in current.processes}
    assert processes["kernel"].ready <= processes["a"].spawned
    assert processes["a"].ready <= processes["driver.x"].spawned


def test_a_killed_service_is_back_by_itself_and_the_next_call_works(launch: Launch) -> None:
    system = launch("a", "b")
    system.ready()
    with system.client() as client:
        before = client.call("a.pid")
        system.kill("a")
        assert gone(before)
        system.wait(lambda current: current.processes[1].restarts == 1)
        assert client.call("a.pid") not in (None, before)
        assert client.call("b.pid") == system.process("b").pid
    current = system.back("a", 1)
    assert next(p.exit for p in current.processes if p.name == "a") == "killed by SIGKILL"


def test_a_killed_kernel_is_back_and_everyone_registers_again(launch: Launch) -> None:
    system = launch("a", "b")
    system.ready()
    with system.client() as client:
        pids = [client.call("a.pid"), client.call("b.pid")]
    system.kill("kernel")
    system.back("kernel", 1)
    with system.client() as client:
        assert [client.call("a.pid"), client.call("b.pid")] == pids


def test_a_service_that_hangs_is_killed_and_started_again(launch: Launch) -> None:
    system = launch("a")
    system.ready()
    with system.client() as client:
        while line(client, "a").limit != FAKE_LIMIT:
            client.call("a.pid")
        with pytest.raises(TimedOut):
            client.call("a.hang", timeout=0.5)
        system.back("a", 1)
        assert client.call("a.pid") == system.process("a").pid
    log = (system.state / "logs" / "a.log").read_text()
    assert "in hang" in log, "the traceback of where it hung belongs in the log"


@pytest.mark.slow
def test_a_kernel_that_hangs_is_killed_and_started_again(launch: Launch) -> None:
    system = launch("a")
    system.ready()
    system.kill("kernel", signal.SIGSTOP)
    system.back("kernel", 1)
    with system.client() as client:
        assert client.call("a.pid") == system.process("a").pid


def test_one_that_always_crashes_is_given_up_visibly_and_the_rest_goes_on(launch: Launch) -> None:
    system = launch("a", "bad:crash")
    current = system.wait(lambda s: any(p.state == "failed" for p in s.processes))
    assert current.state == "degraded"
    assert system.process("bad").exit == "exit status 1"
    assert "a fault in the fake service" in (system.state / "logs" / "bad.log").read_text()
    with system.client() as client:
        assert client.call("a.pid") == system.process("a").pid
    assert system.stop() == 0


def test_one_that_crashes_at_its_first_start_comes_up_at_the_second(launch: Launch) -> None:
    system = launch("a:once", "driver.x")
    system.back("a", 1)


def test_the_system_stops_backwards_and_leaves_nothing(launch: Launch) -> None:
    system = launch("a", "b", "c")
    system.ready()
    pids = system.pids()
    assert system.stop() == 0
    assert (system.state / "stopped").read_text().split() == ["c", "b", "a"]
    assert all(gone(pid) for pid in pids)
    assert list(system.run.iterdir()) == []


def test_one_that_will_not_leave_is_killed(launch: Launch) -> None:
    system = launch("a", "b:stubborn")
    system.ready()
    pids = system.pids()
    assert system.stop() == 0
    assert all(gone(pid) for pid in pids)
    assert (system.state / "stopped").read_text().split() == ["a"]


def test_no_process_outlives_a_killed_supervisor_and_the_next_one_starts_clean(launch: Launch) -> None:
    system = launch("a", "b:stubborn", "driver.x")
    system.ready()
    pids = system.pids()
    system.crash()
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)
    assert (system.run / "kernel.sock").exists()
    system.supervisor = system.spawn("a")
    system.ready()
    assert system.stop() == 0


def test_a_second_supervisor_is_refused_with_a_reason(launch: Launch) -> None:
    system = launch("a")
    system.ready()
    second = system.spawn("a")
    _, words = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"a system is up in {system.run} (process {system.supervisor.pid})" in words
    with system.client() as client:
        assert client.call("a.pid") == system.process("a").pid


def test_a_system_is_stopped_from_outside_and_again_without_complaint(launch: Launch) -> None:
    system = launch("a")
    system.ready()
    assert lock.holder(system.run) == system.supervisor.pid
    assert control.stop(system.run)
    assert lock.holder(system.run) is None
    assert not control.stop(system.run)
    assert list(system.run.iterdir()) == []


def test_stopping_clears_up_after_a_supervisor_that_was_killed(launch: Launch) -> None:
    system = launch("a")
    system.ready()
    system.crash()
    assert not control.stop(system.run)
    assert list(system.run.iterdir()) == []


def test_no_token_is_in_a_log_a_command_line_or_an_environment(launch: Launch) -> None:
    system = launch("a", "driver.x")
    system.ready()
    tokens = [path.read_text() for path in (system.run / "tokens").iterdir()]
    seen = [
        Path(f"/proc/{pid}/{what}").read_text() for pid in system.pids() for what in ("cmdline", "environ")
    ]
    seen += [path.read_text() for path in (system.state / "logs").iterdir()]
    seen.append((system.run / "status.json").read_text())
    assert len(tokens) == 3
    assert not [token for token in tokens if any(token in text for text in seen)]


def test_a_stop_in_the_middle_of_the_boot_leaves_nothing(launch: Launch) -> None:
    system = launch("a", "b", "driver.x")
    system.wait(lambda current: any(process.state == "starting" for process in current.processes))
    assert system.stop() == 0
    assert list(system.run.iterdir()) == []

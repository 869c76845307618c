"""What a process is started with, and what it cannot outlive."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.services.supervisor import process as processes
from llmos.services.supervisor.plan import Process
from llmos.services.supervisor.process import (
    Child,
    Folders,
    command_line,
    describe_exit,
    environment,
    open_log,
)

FOLDERS = Folders(Path("/run/x"), Path("/state/x"), Path("/cache/x"))
INHERITED = {
    "PATH": "/bin",
    "HOME": "/home/x",
    "AWS_SECRET_ACCESS_KEY": "s",
    "XLA_FLAGS": "f",
    "LLMOS_RUN": "/no",
}


def folders(tmp_path: Path) -> Folders:
    tmp_path.chmod(0o700)
    return Folders(tmp_path, tmp_path, tmp_path)


def test_the_environment_is_a_short_list_without_anybodys_secrets() -> None:
    assert environment(Process(name="memory"), FOLDERS, INHERITED) == {
        "PATH": "/bin",
        "HOME": "/home/x",
        "LLMOS_RUN": "/run/x",
        "LLMOS_STATE": "/state/x",
        "LLMOS_CACHE": "/cache/x",
        "LLMOS_SERVICE": "memory",
        "PYTHONFAULTHANDLER": "1",
    }


def test_a_driver_sees_the_devices_settings_and_its_own() -> None:
    driver = Process(
        name="driver.a", devices=True, environment={"OMP_NUM_THREADS": "1", "LLMOS_RUN": "/evil"}
    )
    result = environment(driver, FOLDERS, INHERITED)
    assert (result["XLA_FLAGS"], result["OMP_NUM_THREADS"]) == ("f", "1")
    assert result["LLMOS_RUN"] == "/run/x"


def test_a_command_line_names_what_runs() -> None:
    assert command_line(Process(name="m", module="a.b", arguments=["c"]), 7)[-5:] == [
        "7",
        "m",
        "module",
        "a.b",
        "c",
    ]
    assert command_line(Process(name="m", command=["/x", "-y"]), 7)[-5:] == ["7", "m", "exec", "/x", "-y"]


def test_a_log_is_private_and_is_put_aside_when_it_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 10)
    path = tmp_path / "logs" / "memory.log"
    for text in (b"first, too long", b"second"):
        descriptor = open_log(path)
        os.write(descriptor, text)
        os.close(descriptor)
    assert path.read_bytes() == b"second"
    assert path.with_suffix(".log.1").read_bytes() == b"first, too long"
    assert path.stat().st_mode & 0o777 == 0o600


def test_exits_are_told_in_words() -> None:
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"


def test_a_child_runs_and_is_reaped_with_its_status(tmp_path: Path) -> None:
    child = Child(Process(name="x", command=[sys.executable, "-c", "raise SystemExit(3)"]), folders(tmp_path))
    assert wait(child) == 3


def wait(child: Child) -> int:
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    return child.reap()


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/grandchild; exit 0"
    child = Child(Process(name="x", command=["/bin/sh", "-c", script]), folders(tmp_path))
    assert wait(child) == 0
    assert_gone(int((tmp_path / "grandchild").read_text()))


def assert_gone(pid: int) -> None:
    """Wait for the end of a process that is not ours to reap."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 5.0)[0], f"process {pid} still runs"
    os.close(descriptor)


def test_a_program_that_cannot_be_run_says_so_in_its_log(tmp_path: Path) -> None:
    child = Child(Process(name="x", command=["/no/such/program"]), folders(tmp_path))
    assert wait(child) == 127
    assert "cannot run /no/such/program" in (tmp_path / "logs" / "x.log").read_text()


def test_one_whose_parent_is_gone_already_leaves() -> None:
    stranger = str(os.getppid())
    shim = [sys.executable, "-m", "llmos.services.supervisor.child", stranger, "x", "exec", "/bin/true"]
    assert subprocess.run(shim, check=False).returncode == 125


def test_a_child_has_no_core_dumps_and_no_way_to_more_privileges(tmp_path: Path) -> None:
    script = "ulimit -c; umask; grep NoNewPrivs /proc/self/status"
    assert wait(Child(Process(name="x", command=["/bin/sh", "-c", script]), folders(tmp_path))) == 0
    assert (tmp_path / "logs" / "x.log").read_text().split() == ["0", "0077", "NoNewPrivs:", "1"]

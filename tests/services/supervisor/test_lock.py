"""One supervisor per run folder, whatever became of the last one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.ipc.errors import Busy
from llmos.services.supervisor.lock import RunLock, holder

HOLD = """
import sys
from pathlib import Path
from llmos.services.supervisor.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def hold(run: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with hold(tmp_path) as other:
        assert holder(tmp_path) == other.pid
        with pytest.raises(Busy, match=f"process {other.pid}"):
            RunLock(tmp_path)
        other.kill()


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    with hold(tmp_path) as other:
        other.kill()
        other.wait()
        assert holder(tmp_path) is None
        lock = RunLock(tmp_path)
        lock.release()
    assert os.listdir(tmp_path) == []


def test_nobody_holds_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert holder(tmp_path / "none") is None

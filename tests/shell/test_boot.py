"""``up`` to ``down`` with all the real services, and the null driver without a model."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmos.services.supervisor import lock, status

pytestmark = pytest.mark.system

MANIFEST = """
models = []
[[drivers]]
name = "null0"
kind = "null"
[gateway]
port = 0
"""
Llmos = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as sockets need it."""
    path = Path(tempfile.mkdtemp(prefix="llmos-"))
    (path / "llmos.toml").write_text(MANIFEST)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def llmos(folder: Path) -> Iterator[Llmos]:
    """Start the command in that folder; whatever it started is stopped in the end."""
    environment = {**os.environ, **{f"LLMOS_{n.upper()}": str(folder / n) for n in ("run", "state", "cache")}}

    # Whoever runs the tests in the background has Ctrl-C ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llmos.shell.main", *arguments],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield start
    start("down").communicate(timeout=60)


def done(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_detached_system_is_seen_and_stopped(llmos: Llmos, folder: Path) -> None:
    code, _, words = done(llmos("up", "--detach"))
    assert code == 0, words
    assert "using ./llmos.toml" in words
    assert "HTTP: http://127.0.0.1:" in words
    code, table, words = done(llmos("ps"))
    assert code == 0, words
    assert {line.split()[0] for line in table.splitlines() if " ready " in line} == {
        "supervisor", "kernel", "security", "memory", "scheduler", "models", "monitor", "gateway",
        "driver.null0",
    }  # fmt: skip
    assert "no tasks" in table
    code, key, _ = done(llmos("cap", "--ttl", "1h", "--models", "m"))
    assert code == 0
    assert len(key.split()) == 1
    code, _, words = done(llmos("up"))
    assert code == 1
    assert "a system is up" in words
    assert done(llmos("down"))[0] == 0
    assert lock.holder(folder / "run") is None
    assert list((folder / "run").iterdir()) == []
    assert done(llmos("down"))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_a_signal_stops_everything_in_order(
    llmos: Llmos, folder: Path, number: signal.Signals
) -> None:
    up = llmos("up")
    assert up.stderr is not None
    for line in up.stderr:
        if line.startswith("stop: "):
            break
    up.send_signal(number)
    code, _, words = done(up)
    assert (code, "stopped in" in words) == (0, True)
    assert list((folder / "run").iterdir()) == []


def test_a_system_in_the_foreground_ends_with_its_shell(llmos: Llmos, folder: Path) -> None:
    up = llmos("up")
    assert up.stderr is not None
    for line in up.stderr:
        if line.startswith("stop: "):
            break
    current = status.read(folder / "run")
    assert current is not None
    descriptor = os.pidfd_open(current.pid)
    up.kill()
    up.communicate()
    assert _ends(descriptor)
    assert list((folder / "run").iterdir()) == []


def test_a_driver_that_cannot_start_is_said_and_nothing_is_left(llmos: Llmos, folder: Path) -> None:
    (folder / "llmos.toml").write_text(MANIFEST.replace('"null"', '"no-such-kind"') + "\n")
    code, _, words = done(llmos("up", "--detach"))
    assert code == 1
    assert "driver.null0 does not start" in words
    assert "no driver 'no-such-kind' is installed" in words
    assert list((folder / "run").iterdir()) == []


def _ends(descriptor: int) -> bool:
    ended = bool(select.select([descriptor], [], [], 20.0)[0])
    os.close(descriptor)
    return ended

"""A real model's answer is saved in the middle, and goes on to the letter, also in a new driver."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.scheduler.messages import Tasks
from tests.conftest import wait_until
from tests.system.conftest import LLMOS

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(600)]

RUN = ["run", DEFAULT_MODEL, "Tell me a long story about a lighthouse.", "--max-tokens", "90"]


def test_an_answer_goes_on_from_its_file(up: Any, tmp_path: Path) -> None:
    whole = up.llmos(*RUN, timeout=300.0).stdout
    file = tmp_path / "story"
    with subprocess.Popen(
        [str(LLMOS), *RUN], env=up.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as asking:
        with up.client() as client:
            tasks = lambda: client.call("scheduler.tasks", None, Tasks).tasks  # noqa: E731
            wait_until(lambda: any(task.completion_tokens > 5 for task in tasks()), 120, what="a beginning")
            (task,) = tasks()
        saved = up.llmos("stop", str(task.task), "--save", str(file), timeout=300.0)
        assert saved.returncode == 0, saved.stderr
        said, complaint = asking.communicate(timeout=60)
    assert "ECANCELED" in complaint
    assert whole.startswith(said.rstrip("\n"))
    assert len(said) < len(whole)
    first = up.llmos("cont", str(file), timeout=300.0)
    assert first.stdout == whole, first.stderr
    up.wait_restarted("driver.jax0", up.kill("driver.jax0"))
    up.wait_healthy()
    again = up.llmos("cont", str(file), timeout=300.0)
    assert again.stdout == whole, again.stderr

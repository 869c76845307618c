"""The real model, parked and woken by the command that people type, answers as before; also after kill -9."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.services.manifest import DEFAULT_MODEL
from tests.system.test_recovery import say

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]


def state(up: Any) -> str:
    done = up.llmos("models")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{DEFAULT_MODEL} ")]
    return str(line.split()[1])


def park(up: Any) -> None:
    done = up.llmos("park", DEFAULT_MODEL)
    assert done.returncode == 0, done.stderr
    assert f"llmos wake {DEFAULT_MODEL}" in done.stderr
    assert state(up) == "parked"


def test_a_request_wakes_a_parked_model_and_is_answered_as_before(up: Any) -> None:
    before = say(up)
    park(up)
    assert "parked" in up.llmos("ps").stdout
    with up.http() as http:
        assert http.get("/healthz").status_code == 200, "a parked model is no illness"
    assert say(up) == before
    assert state(up) == "ready"


def test_a_model_is_woken_by_hand(up: Any) -> None:
    before = say(up)
    park(up)
    done = up.llmos("wake", DEFAULT_MODEL)
    assert done.returncode == 0, done.stderr
    assert "waking it took" in done.stderr
    assert state(up) == "ready"
    assert say(up) == before


@pytest.mark.parametrize("name", ["driver.jax0", "models", "scheduler"])
def test_a_request_is_answered_whatever_dies_while_the_model_is_parked(up: Any, name: str) -> None:
    before = say(up)
    park(up)
    old = up.kill(name)
    assert say(up) == before
    up.wait_restarted(name, old)
    up.wait_healthy()

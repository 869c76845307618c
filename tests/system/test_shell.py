"""The command as people type it, against the running system; and what health says while it comes up."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmos.services.manifest import DEFAULT_MODEL

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(600)]


def test_up_says_what_became_ready_and_where_it_is(up: Any) -> None:
    for name in ("kernel", "security", "memory", "scheduler", "models", "monitor", "gateway", "driver.jax0"):
        assert f"\n{name} " in f"\n{up.words}", f"{name} is named"
    assert f"model {DEFAULT_MODEL} is ready on jax0" in up.words
    assert f"HTTP: {up.url}/v1" in up.words
    assert "stop: llmos down" in up.words


def test_loading_is_shown_while_it_goes_on(up: Any) -> None:
    assert any(line.startswith(f"load: {DEFAULT_MODEL} ") for line in up.words.splitlines())


def test_health_is_not_ok_with_the_reason_while_the_model_loads_and_ok_when_it_is_up(up: Any) -> None:
    loading = [body for code, body in up.health if code == 503]
    assert any(f"loading {DEFAULT_MODEL}" in " ".join(body["reasons"]) for body in loading)
    assert all(not body["ok"] and body["reasons"] for body in loading)
    assert all(body == {"ok": True, "reasons": []} for code, body in up.health if code == 200)
    up.wait_healthy()


def test_ps_lists_the_processes(up: Any) -> None:
    done = up.llmos("ps")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for process in up.status().processes:
        assert str(process.pid) in lines[process.name]
        assert " ready " in lines[process.name]


def test_models_shows_it_ready(up: Any) -> None:
    done = up.llmos("models")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith(DEFAULT_MODEL))
    assert line.split()[1:5] == ["ready", "jax0", "llama", "135M"]


def test_run_prints_the_answer_and_its_figures(up: Any) -> None:
    done = up.llmos("run", DEFAULT_MODEL, "What is the capital of France?", "--max-tokens", "12", "--stats")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr
    assert "first token" in done.stderr


def test_run_of_a_wrong_model_is_one_line(up: Any) -> None:
    done = up.llmos("run", "no-such-model", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert DEFAULT_MODEL in done.stderr


def test_doctor_finds_nothing_wrong(up: Any) -> None:
    done = up.llmos("doctor")
    assert done.returncode == 0, done.stdout
    assert "all is well" in done.stdout


def test_a_second_up_is_refused(up: Any) -> None:
    done = up.llmos("up")
    assert done.returncode == 1
    assert "a system is up" in done.stderr


@pytest.mark.slow
def test_a_model_is_unloaded_and_loaded_by_name(up: Any) -> None:
    done = up.llmos("unload", DEFAULT_MODEL)
    assert done.returncode == 0, done.stderr
    assert up.llmos("models").stdout.split(DEFAULT_MODEL)[1].split()[0] == "unloaded"
    refused = up.llmos("run", DEFAULT_MODEL, "hi")
    assert refused.returncode == 1
    assert f"llmos load {DEFAULT_MODEL}" in refused.stderr
    done = up.llmos("load", DEFAULT_MODEL, timeout=300.0)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"load {DEFAULT_MODEL}: ")
    assert f"model {DEFAULT_MODEL} is ready on jax0" in done.stderr
    assert up.llmos("run", DEFAULT_MODEL, "hi", "--max-tokens", "2").returncode == 0
    up.wait_healthy()


@pytest.mark.slow
def test_the_demo_answers_and_leaves_nothing(up: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmos.shell.demo"], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "operating system" in done.stdout.split("?", 1)[1].lower()
    assert "tokens/s" in done.stdout
    assert "driver.jax0" in done.stdout
    assert "no process and no socket is left" in done.stderr

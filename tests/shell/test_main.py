"""The command line: complete help, quick answers, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from llmos.shell.main import main, parser

VERBS = (
    "up",
    "down",
    "ps",
    "kill",
    "nice",
    "stop",
    "cont",
    "free",
    "run",
    "chat",
    "models",
    "load",
    "unload",
    "pull",
    "version",
    "doctor",
    "cap",
)


@pytest.fixture(autouse=True)
def nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN", "STATE", "CACHE"):
        monkeypatch.setenv(f"LLMOS_{name}", str(tmp_path / name.lower()))


def test_the_help_names_every_verb() -> None:
    assert all(f"\n    {verb} " in parser().format_help() for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_all_its_options(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: llmos {verb}")
    assert len(text.splitlines()) > 4


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "first steps" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["dance"], ["run"], ["up", "--no-such"], ["cap", "--band", "best"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["ps"], ["run", "m", "hello"], ["chat"], ["cap"], ["load", "m"], ["unload", "m"]]
)
def test_with_nothing_up_one_line_says_what_to_do(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"llmos {arguments[0]}: EHOSTDOWN: ")
    assert "llmos up" in captured.err


def test_down_with_nothing_up_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert capsys.readouterr().err == "nothing was running\n"


def test_a_manifest_that_is_wrong_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "llmos.toml"
    path.write_text("[gateway]\nprot = 1\n")
    assert main(["up", "--manifest", str(path)]) == 1
    assert "prot" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_cannot_be_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "no-such-model"]) == 1
    assert "smollm2-135m-instruct" in capsys.readouterr().err


def test_models_that_could_be_had_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "llmos pull smollm2-135m-instruct" in capsys.readouterr().out


def test_version_needs_nothing_heavy() -> None:
    script = (
        "import sys; from llmos.shell.main import main; main(['version'])\n"
        "print([m for m in ('zmq', 'msgspec', 'rich', 'jax', 'numpy', 'asyncio') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == f"llmos {metadata.version('llmos')}\n[]\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m llmos.shell.main models | true"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr

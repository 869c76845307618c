"""Progress on a pipe: a line at each phase, not one at each step."""

from __future__ import annotations

import pytest

from llmos.shell.progress import Bar


def test_a_pipe_gets_one_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("pull m", bytes=True) as bar:
        for done in range(100):
            bar.update("download", done, 100)
        bar.update("verify", 0, 0)
    assert capsys.readouterr().err == "pull m: download 0%\npull m: verify\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llmos.shell.progress.is_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar("pull m", bytes=True) as bar:
        bar.update("download", 50, 100)
    assert "pull m: download" in capsys.readouterr().err

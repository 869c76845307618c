"""The doctor names what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.shell import doctor


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RUN", "STATE", "CACHE"):
        monkeypatch.setenv(f"LLMOS_{name}", str(tmp_path / name.lower()))
    return tmp_path


def test_folders_that_are_not_there_are_no_problem() -> None:
    assert [finding.level for finding in doctor.folders()] == ["ok", "ok", "ok"]


def test_a_folder_that_others_may_enter_is_broken(private: Path) -> None:
    (private / "run").mkdir(mode=0o755)
    (private / "run").chmod(0o755)
    finding = next(doctor.folders())
    assert finding.level == "broken"
    assert finding.advice == f"chmod 700 {private / 'run'}"


def test_a_cache_that_others_may_read_is_fine_and_one_they_may_write_is_not(private: Path) -> None:
    (private / "cache").mkdir()
    (private / "cache").chmod(0o755)
    assert [finding.level for finding in doctor.folders()] == ["ok", "ok", "ok"]
    (private / "cache").chmod(0o777)
    assert [finding.level for finding in doctor.folders()] == ["ok", "ok", "broken"]


def test_a_socket_path_that_is_too_long_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_RUN", "/tmp/" + "x" * 120)
    finding = next(doctor.socket_paths())
    assert finding.level == "broken"
    assert "LLMOS_RUN" in finding.advice


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("msgspec", "no_such_package"))
    finding = next(doctor.packages())
    assert (finding.level, "no_such_package" in finding.what) == ("broken", True)


def test_a_missing_model_is_said_and_is_no_fault() -> None:
    finding = next(doctor.model_files())
    assert finding.level == "note"
    assert "llmos pull" in finding.advice


def test_native_kernels_are_announced_found_or_excused(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_NATIVE", "off")
    off = next(doctor.native_kernels())
    assert (off.level, "LLMOS_NATIVE" in off.what) == ("note", True)
    (private / "c++").touch(mode=0o700)
    monkeypatch.setenv("PATH", str(private))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LLMOS_NATIVE")
    assert "when a model is first loaded" in next(doctor.native_kernels()).what
    (private / "cache" / "native").mkdir(parents=True)
    (private / "cache" / "native" / "kernels-0.so").touch()
    assert next(doctor.native_kernels()) == ("ok", f"native CPU kernels, compiled by {private}/c++", "")

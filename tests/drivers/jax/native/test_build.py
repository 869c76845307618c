"""Kernels are compiled once, and their absence has a reason that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.drivers.jax.native import build
from llmos.ipc.errors import AccessDenied, IOFailure, NotSupported


@pytest.fixture
def no_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An otherwise empty folder of programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build.SWITCH, raising=False)
    return programs


def fake(programs: Path, script: str) -> None:
    """A compiler that does what a script says."""
    (programs / "c++").write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{script}\n")
    (programs / "c++").chmod(0o700)


def test_without_a_compiler_one_is_asked_for(no_compilers: Path, tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=r"install g\+\+ or clang\+\+"):
        build.library(tmp_path / "native")


def test_a_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.SWITCH, "off")
    with pytest.raises(NotSupported, match="turned off by LLMOS_NATIVE"):
        build.library(tmp_path / "native")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(no_compilers: Path, tmp_path: Path) -> None:
    fake(no_compilers, "echo 'kernels.cc:1: error: too old' >&2; exit 1")
    with pytest.raises(IOFailure, match="error: too old"):
        build.library(tmp_path / "native")
    assert list((tmp_path / "native").iterdir()) == []


def test_what_is_no_library_is_refused_by_name(no_compilers: Path, tmp_path: Path) -> None:
    fake(no_compilers, "exit 0")
    with pytest.raises(IOFailure, match=r"cannot be loaded.*remove .*kernels-"):
        build.library(tmp_path / "native")


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir(mode=0o755)
    (tmp_path / "native").chmod(0o755)
    with pytest.raises(AccessDenied, match="chmod 700"):
        build.library(tmp_path / "native")


def test_a_file_that_others_may_write_is_not_loaded(no_compilers: Path, tmp_path: Path) -> None:
    fake(no_compilers, "exit 0")
    with pytest.raises(IOFailure):
        build.library(tmp_path / "native")
    made = next((tmp_path / "native").iterdir())
    made.chmod(0o722)
    with pytest.raises(NotSupported, match="only you may write"):
        build.library(tmp_path / "native")


def test_a_new_source_has_new_names_in_programs() -> None:
    assert build.target("product").startswith("llmos_product_")
    assert build.target("product") != build.target("attention")

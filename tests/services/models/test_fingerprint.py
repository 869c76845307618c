"""A model is recognised by what is in its files, not by where they lie."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llmos.ipc.errors import IOFailure
from llmos.services.models.fingerprint import SAMPLE_BYTES, fingerprint


def test_the_name_does_not_matter_and_every_sample_and_the_type_do(tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 * SAMPLE_BYTES // 256)
    (tmp_path / "a.gguf").write_bytes(data)
    (tmp_path / "b.gguf").write_bytes(data)
    assert fingerprint(tmp_path / "a.gguf", "float32") == fingerprint(tmp_path / "b.gguf", "float32")
    assert fingerprint(tmp_path / "a.gguf", "float32") != fingerprint(tmp_path / "a.gguf", "bfloat16")
    for at in (0, len(data) // 2, len(data) - 1):
        (tmp_path / "b.gguf").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert fingerprint(tmp_path / "a.gguf", "float32") != fingerprint(tmp_path / "b.gguf", "float32")


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "deep" / "weights").write_text("1")
    assert fingerprint(tmp_path / "x", "float32") == fingerprint(tmp_path / "y", "float32")
    (tmp_path / "y" / "deep" / "weights").write_text("2")
    assert fingerprint(tmp_path / "x", "float32") != fingerprint(tmp_path / "y", "float32")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *_: object) -> object:
        raise OSError(errno.EIO, "Input/output error", str(path))

    (tmp_path / "m.gguf").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(IOFailure, match=r"m\.gguf cannot be read: Input/output error"):
        fingerprint(tmp_path / "m.gguf", "float32")

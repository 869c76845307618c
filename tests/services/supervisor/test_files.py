"""What lies in the run folder, and that it goes again."""

from __future__ import annotations

from pathlib import Path

from llmos.ipc import codec
from llmos.kernel.messages import BootFile
from llmos.services.manifest import Manifest, read_running
from llmos.services.supervisor.files import clear, prepare
from llmos.services.supervisor.grants import boot_grants, read_rights


def test_what_is_laid_out_is_private_and_complete(tmp_path: Path) -> None:
    manifest = Manifest()
    grants = boot_grants(manifest, read_rights())
    own = prepare(tmp_path, manifest, grants)
    tokens = {path.name: path.read_text() for path in (tmp_path / "tokens").iterdir()}
    assert set(tokens) == set(grants) - {"supervisor"}
    assert own not in tokens.values()
    assert len(codec.decode((tmp_path / "boot").read_bytes(), BootFile).entries) == len(grants)
    assert read_running(tmp_path) == manifest
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_clearing_removes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    prepare(tmp_path, Manifest(), boot_grants(Manifest(), read_rights()))
    (tmp_path / "kernel.sock").touch()
    (tmp_path / "letter.txt").touch()
    clear(tmp_path)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]

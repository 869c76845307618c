"""The root key: made once, private, and refused where it is not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from llmos.ipc.errors import AccessDenied
from llmos.services.security import rootkey


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    key = rootkey.load(state)
    assert str(rootkey.load(state).public_key) == str(key.public_key)
    path = state / "keys" / "root.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    rootkey.load(tmp_path / "s")
    (tmp_path / "s/keys/root.key").chmod(0o640)
    with pytest.raises(AccessDenied, match="chmod 600"):
        rootkey.load(tmp_path / "s")


def test_a_key_cut_short_is_refused(tmp_path: Path) -> None:
    rootkey.load(tmp_path / "s")
    (tmp_path / "s/keys/root.key").write_bytes(b"short")
    with pytest.raises(AccessDenied, match="32 bytes"):
        rootkey.load(tmp_path / "s")


def test_a_key_that_is_a_link_is_refused(tmp_path: Path) -> None:
    rootkey.load(tmp_path / "s")
    path = tmp_path / "s/keys/root.key"
    path.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(OSError, match=r"root\.key"):
        rootkey.load(tmp_path / "s")

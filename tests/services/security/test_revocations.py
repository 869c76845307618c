"""The revocation list: on disk before anyone is told, and never half read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.services.security.revocations import Revocations

ID, OTHER = "ab" * 64, "cd" * 64


def test_what_is_revoked_stays_revoked(tmp_path: Path) -> None:
    path = tmp_path / "revoked"
    first = Revocations(path)
    assert ID not in first
    first.add([ID])
    first.add([OTHER])
    again = Revocations(path)
    assert sorted(again) == [ID, OTHER]
    assert len(again) == 2
    assert ID in first


def test_the_list_is_private(tmp_path: Path) -> None:
    path = tmp_path / "revoked"
    Revocations(path).add([ID])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["revoked"]


@pytest.mark.parametrize("id", ["", "x" * 128, ID.upper(), ID + "\n", "ab"])
def test_what_is_no_id_is_refused(tmp_path: Path, id: str) -> None:
    with pytest.raises(InvalidArgument):
        Revocations(tmp_path / "revoked").add([id])


def test_a_damaged_list_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "revoked"
    path.write_text(f"{ID}\n{OTHER[:20]}\n")
    with pytest.raises(AccessDenied, match="damaged"):
        Revocations(path)

"""The disk tier from the side of who can change the disk: what is not exactly what was written is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.sdk.tiers import DiskTier, HostTier
from llmos.ipc.errors import IOFailure, NoMemory

KEY, OTHER = bytes(32), bytes([1] * 32)
SIZE = 5000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    made = DiskTier(tmp_path / "pages", "m", 4, SIZE)
    yield made
    made.close()


def page(number: int) -> bytes:
    return bytes([number]) * SIZE


def stride(disk: DiskTier) -> int:
    return os.fstat(disk._file).st_size // 4


def test_a_block_comes_back(disk: DiskTier) -> None:
    disk.write(3, page(1), KEY)
    disk.write(0, memoryview(page(2)), KEY)
    disk.write(3, page(3), KEY)
    assert (disk.read(3, KEY), disk.read(0, KEY)) == (page(3), page(2))


def test_the_file_has_no_name_no_secret_and_room_for_its_blocks_only(disk: DiskTier, tmp_path: Path) -> None:
    assert list((tmp_path / "pages").iterdir()) == []
    assert (tmp_path / "pages").stat().st_mode & 0o777 == 0o700
    disk.write(3, b"secret" + page(0)[6:], KEY)
    assert b"secret" not in os.pread(disk._file, 1 << 20, 0)
    assert os.fstat(disk._file).st_mode & 0o777 == 0o600
    assert stride(disk) == 8192
    assert os.fstat(disk._file).st_blocks * 512 <= 8192


def test_another_tenant_cannot_open_it(disk: DiskTier) -> None:
    disk.write(0, page(1), KEY)
    with pytest.raises(IOFailure, match="another tenant"):
        disk.read(0, OTHER)


@pytest.mark.parametrize("at", [0, 4, 5, 20, SIZE + 32])
def test_a_changed_byte_is_noticed(disk: DiskTier, at: int) -> None:
    disk.write(1, page(1), KEY)
    where = stride(disk) + at
    os.pwrite(disk._file, bytes([os.pread(disk._file, 1, where)[0] ^ 1]), where)
    with pytest.raises(IOFailure):
        disk.read(1, KEY)


def test_swapped_and_replayed_blocks_are_noticed(disk: DiskTier) -> None:
    width = stride(disk)
    disk.write(0, page(1), KEY)
    disk.write(1, page(2), KEY)
    old = os.pread(disk._file, width, 0)
    os.pwrite(disk._file, old, width)
    with pytest.raises(IOFailure):
        disk.read(1, KEY)
    disk.write(0, page(3), KEY)
    os.pwrite(disk._file, old, 0)
    with pytest.raises(IOFailure):
        disk.read(0, KEY)


def test_a_block_of_another_file_is_noticed(disk: DiskTier, tmp_path: Path) -> None:
    other = DiskTier(tmp_path / "pages", "m", 4, SIZE)
    for tier in (disk, other):
        tier.write(0, page(1), KEY)
    os.pwrite(disk._file, os.pread(other._file, stride(disk), 0), 0)
    with pytest.raises(IOFailure):
        disk.read(0, KEY)
    other.close()


def test_what_was_never_written_or_cut_off_is_not_read(disk: DiskTier) -> None:
    with pytest.raises(IOFailure, match="holds nothing"):
        disk.read(2, KEY)
    disk.write(2, page(1), KEY)
    os.ftruncate(disk._file, 2 * stride(disk) + 100)
    with pytest.raises(IOFailure, match="cut short"):
        disk.read(2, KEY)


def test_a_full_disk_is_told_and_other_blocks_live_on(
    disk: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(0, page(1), KEY)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoMemory, match="the disk is full"):
        disk.write(1, page(2), KEY)
    assert disk.read(0, KEY) == page(1)
    with pytest.raises(IOFailure, match="holds nothing"):
        disk.read(1, KEY)


def test_host_blocks_do_not_touch_each_other() -> None:
    host = HostTier(3, 10)
    host[1] = b"x" * 10
    assert [bytes(host[i]) for i in range(3)] == [bytes(10), b"x" * 10, bytes(10)]

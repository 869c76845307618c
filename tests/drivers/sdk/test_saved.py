"""Saved tasks from the side of who holds the file: it is opened as it was written, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.sdk.saved import Contents, SavedFile, write
from llmos.ipc.errors import InvalidArgument, IOFailure, LLMOSError, NoMemory, NotFound
from llmos.services import saved
from llmos.services.saved import FileHeader
from llmos.services.security import keys

KEY = bytes(32)
NAME = "0" * 32
PAGES = [bytes([n]) * 100 for n in range(3)]
CONTENTS = Contents(
    file=b"f" * 16, layout="l", digest=b"d", pages=3, page_bytes=100, state=b"the secret state"
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOS_STATE", str(tmp_path))
    return tmp_path


def fill(put: Callable[[int, bytes], None]) -> str:
    for index in (2, 0, 1):
        put(index, PAGES[index])
    return "done"


def make(name: str = NAME, contents: Contents = CONTENTS, model: str = "m") -> Path:
    write(name, KEY, FileHeader(model), contents, fill)
    return saved.path_of(name)


def read(name: str = NAME, key: bytes = KEY) -> list[bytes]:
    with closing(SavedFile(name, key)) as file:
        return [file.page(index) for index in range(file.contents.pages)]


def test_it_is_read_as_it_was_written() -> None:
    result, size = write(NAME, KEY, FileHeader("m"), CONTENTS, fill)
    assert result == "done"
    assert saved.path_of(NAME).stat().st_size == size
    assert saved.path_of(NAME).stat().st_mode & 0o777 == 0o600
    with closing(SavedFile(NAME, KEY)) as file:
        assert file.contents == CONTENTS
        assert file.header == FileHeader("m")
    assert read() == PAGES
    assert b"secret" not in saved.path_of(NAME).read_bytes()


def test_another_key_opens_nothing() -> None:
    make()
    with pytest.raises(IOFailure, match="another tenant"):
        read(key=bytes([1] * 32))


def test_no_byte_can_be_changed() -> None:
    path = make()
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(IOFailure):
            read()


def test_it_cannot_be_cut_or_lengthened() -> None:
    path = make()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(IOFailure):
            read()
    path.write_bytes(whole + b"\0")
    with pytest.raises(IOFailure):
        read()


def test_pages_cannot_change_places_or_come_from_another_file() -> None:
    path, width = make(), 100 + keys.OVERHEAD
    other = make(
        "1" * 32, Contents(file=b"g" * 16, layout="l", digest=b"d", pages=3, page_bytes=100, state=b"")
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: -2 * width] + whole[-width:] + whole[-2 * width : -width])
    with pytest.raises(IOFailure):
        read()
    path.write_bytes(whole[:-width] + other.read_bytes()[-width:])
    with pytest.raises(IOFailure):
        read()


def test_the_model_in_the_header_cannot_be_exchanged() -> None:
    path = make()
    begin = len(saved.encode_header(FileHeader("m")))
    path.write_bytes(saved.encode_header(FileHeader("n")) + path.read_bytes()[begin:])
    with pytest.raises(IOFailure):
        read()


@pytest.mark.parametrize("name", ["", "../root.key", "a/b", "0" * 31, "0" * 31 + "G", "0" * 33])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidArgument):
        saved.path_of(name)


def test_links_and_what_is_not_there_are_not_opened(state: Path) -> None:
    with pytest.raises(NotFound):
        read()
    (state / "elsewhere").write_bytes(make("1" * 32).read_bytes())
    saved.path_of(NAME).symlink_to(state / "elsewhere")
    with pytest.raises(IOFailure):
        read()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def broken(*_: Any) -> int:
        raise OSError(number, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises((NoMemory, IOFailure)):
        make()
    assert list(saved.folder().iterdir()) == []


def test_a_driver_that_fails_leaves_nothing() -> None:
    def failing(put: object) -> None:
        raise IOFailure("the device failed")

    with pytest.raises(LLMOSError, match="the device failed"):
        write(NAME, KEY, FileHeader("m"), CONTENTS, failing)
    assert list(saved.folder().iterdir()) == []

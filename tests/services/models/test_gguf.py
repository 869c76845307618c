"""The metadata of GGUF files: read in full, or refused without harm."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc.errors import InvalidArgument, IOFailure
from llmos.services.models.gguf import read_metadata
from tests.services.models.gguf_file import write_gguf

METADATA = {"a": 1, "b": "text", "c": [1, -2], "d": ["x", "ü"], "e": True, "f": 0.5}


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    assert read_metadata(write_gguf(tmp_path / "m.gguf", METADATA)) == METADATA


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(IOFailure, match="No such file"):
        read_metadata(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidArgument, match="no GGUF"):
        read_metadata(path)
    with pytest.raises(InvalidArgument, match="version 9"):
        read_metadata(write_gguf(path, {}, version=9))


def test_lengths_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60))
    with pytest.raises(InvalidArgument, match="exceeds"):
        read_metadata(path)


@given(st.data())
def test_a_damaged_file_is_refused_and_never_crashes_the_reader(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "m.gguf", METADATA)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        with contextlib.suppress(InvalidArgument):
            read_metadata(path)

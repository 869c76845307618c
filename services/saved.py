"""Saved tasks as files: where they lie, what they may be called, and the part of them that is not sealed.

A file begins with ``MAGIC``, the length of a header (4 bytes, big-endian) and the header; what follows is
sealed by a driver (``llmos.drivers.sdk.saved``). The header is authenticated with it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

import msgspec

from llmos.ipc import codec, paths
from llmos.ipc.errors import InvalidArgument, IOFailure, LLMOSError, NotFound

MAGIC = b"LLMOS task 1\n"
HEADER_LIMIT = 4096
LENGTH_BYTES = 4
_NAME = re.compile(r"[0-9a-f]{32}")


class FileHeader(msgspec.Struct, frozen=True):
    """What must be known to find out who can open the rest."""

    model: str


def folder() -> Path:
    """The private folder through which saved tasks come and go."""
    path = paths.state_dir() / "saved"
    try:
        return paths.private_dir(path)
    except OSError as error:
        raise IOFailure(f"no folder for saved tasks at {path}: {error.strerror}") from None


def new_name() -> str:
    return secrets.token_hex(16)


def path_of(name: str) -> Path:
    """The file of this name; names are made by ``new_name``, so no client can name another file."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument("a saved task is named by 32 hexadecimal digits")
    return folder() / name


def open_file(name: str) -> BinaryIO:
    """A saved task, for reading."""
    try:
        file = os.fdopen(os.open(path_of(name), os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except FileNotFoundError:
        raise NotFound(f"there is no saved task {name}") from None
    except OSError as error:
        raise IOFailure(f"saved task {name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise IOFailure(f"saved task {name} is no file")
    return file


def encode_header(header: FileHeader) -> bytes:
    """The first bytes of a file."""
    body = codec.encode(header)
    return MAGIC + len(body).to_bytes(LENGTH_BYTES, "big") + body


def read_header(file: BinaryIO) -> tuple[FileHeader, bytes]:
    """The header and its bytes; leaves the file behind them. IOFailure if this is no saved task."""
    begin = file.read(len(MAGIC) + LENGTH_BYTES)
    length = int.from_bytes(begin[len(MAGIC) :], "big")
    if begin[: len(MAGIC)] != MAGIC or not 0 < length <= HEADER_LIMIT:
        raise IOFailure("this is no task that llmos stop --save wrote")
    body = file.read(length)
    try:
        return codec.decode(body, FileHeader), begin + body
    except LLMOSError as error:
        raise IOFailure(f"the header of this saved task is damaged: {error.message}") from None

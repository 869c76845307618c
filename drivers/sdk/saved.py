"""The sealed part of a saved task: what the scheduler wants back, and the KV pages it had.

After the header come the length of the sealed ``Contents`` (4 bytes, big-endian), these, and the pages, each
sealed by itself. The associated data bind the contents to the header, and a page to its file and its place,
so that nothing can be changed, exchanged or left out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

import msgspec

from llmos.drivers.sdk.driver import Put
from llmos.ipc import codec, limits
from llmos.ipc.errors import IOFailure, LLMOSError, NoMemory
from llmos.services import saved
from llmos.services.saved import LENGTH_BYTES, FileHeader
from llmos.services.security import keys

CONTENTS_LIMIT = limits.BODY_BYTES
T = TypeVar("T")


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds besides pages. ``layout`` says what a page looks like, ``digest`` of which tokens
    they are; ``state`` is the scheduler's."""

    file: bytes
    layout: str
    digest: bytes
    pages: int
    page_bytes: int
    state: bytes


class SavedFile:
    """A file that was opened with the tenant's key. IOFailure if anything in it is not as it was written."""

    def __init__(self, name: str, key: bytes) -> None:
        self._key = key
        self._file = saved.open_file(name)
        try:
            self.header, begin = saved.read_header(self._file)
            length = int.from_bytes(self._file.read(LENGTH_BYTES), "big")
            if not keys.OVERHEAD <= length <= CONTENTS_LIMIT:
                raise IOFailure("this saved task is damaged, or cut short")
            self.contents = _decode(keys.unseal(key, self._file.read(length), begin))
            self._first = self._file.tell()
            self._width = self.contents.page_bytes + keys.OVERHEAD
            whole = self._first + self.contents.pages * self._width
            if os.fstat(self._file.fileno()).st_size != whole:
                raise IOFailure(f"this saved task is damaged: it should have {whole} bytes")
        except LLMOSError:
            self.close()
            raise

    def page(self, index: int) -> bytes:
        """A page; may be called from several threads."""
        try:
            sealed = os.pread(self._file.fileno(), self._width, self._first + index * self._width)
        except OSError as error:
            raise IOFailure(f"page {index} of a saved task was not read: {error.strerror}") from None
        return keys.unseal(self._key, sealed, _place(self.contents.file, index))

    def close(self) -> None:
        self._file.close()


def write(
    name: str, key: bytes, header: FileHeader, contents: Contents, fill: Callable[[Put], T]
) -> tuple[T, int]:
    """Write a file completely or not at all: ``fill`` is given a function that takes page by page, in any
    order, from several threads. What ``fill`` returned, and the size of the file.

    NoMemory if the disk is full, IOFailure if it fails.
    """
    target = saved.path_of(name)
    temporary = target.with_suffix(".part")
    begin = saved.encode_header(header)
    sealed = keys.seal(key, codec.encode(contents), begin)
    if len(sealed) > CONTENTS_LIMIT:
        raise NoMemory(f"a task of {len(sealed)} bytes without its pages is too large to be saved")
    begin += len(sealed).to_bytes(LENGTH_BYTES, "big") + sealed
    width = contents.page_bytes + keys.OVERHEAD
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            _put(file, begin, 0)
            result = fill(
                lambda index, data: _put(
                    file, keys.seal(key, data, _place(contents.file, index)), len(begin) + index * width
                )
            )
            os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoMemory("the disk is full: make room, then save the task again") from None
        raise IOFailure(f"the task was not saved: {error.strerror}") from None
    except LLMOSError:
        temporary.unlink(missing_ok=True)
        raise
    return result, len(begin) + contents.pages * width


def _put(file: int, data: bytes, at: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)


def _place(file: bytes, index: int) -> bytes:
    return b"task page" + file + index.to_bytes(8, "big")


def _decode(body: bytes) -> Contents:
    try:
        return codec.decode(body, Contents)
    except LLMOSError as error:
        raise IOFailure(f"this saved task was written by another version: {error.message}") from None

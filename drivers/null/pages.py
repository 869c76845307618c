"""The null driver's KV cache: a page holds the tokens it was computed from, so a wrong one is noticed.

A page is ``prefix, count, tokens``, 32-bit numbers: the CRC of all tokens before the page (begun by
the sequence's salt), how many tokens
are in it, and these tokens.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence

from llmos.ipc.errors import InvalidArgument

_HEAD = struct.Struct("II")
_WIDTH = 4


def page_size(page_tokens: int) -> int:
    """Bytes of one page."""
    return _HEAD.size + _WIDTH * page_tokens


class Pages:
    """The pages of one model, in one buffer."""

    def __init__(self, count: int, page_tokens: int) -> None:
        self.size = page_size(page_tokens)
        self.page_tokens = page_tokens
        self._memory = memoryview(bytearray(count * self.size))

    def __getitem__(self, page: int) -> memoryview:
        """The bytes of a page."""
        return self._memory[page * self.size : (page + 1) * self.size]

    def give(self, pages: Iterable[int]) -> None:
        """These pages are this model's from now on, whatever was in them."""

    def write(
        self, table: Sequence[int], tokens: Sequence[int], start: int, stop: int, salt: int = 0
    ) -> None:
        """Compute the KV of ``tokens[start:stop]`` into the pages of a block table; ``salt`` changes it."""
        while start < stop:
            index, offset = divmod(start, self.page_tokens)
            end = min(stop, (index + 1) * self.page_tokens)
            page = self[table[index]]
            prefix = _HEAD.unpack_from(page)[0] if offset else self._prefix(table, index, salt)
            _HEAD.pack_into(page, 0, prefix, end - index * self.page_tokens)
            at = _HEAD.size + offset * _WIDTH
            page[at : at + (end - start) * _WIDTH] = array("I", tokens[start:end]).tobytes()
            start = end

    def check(self, table: Sequence[int], tokens: Sequence[int], salt: int = 0) -> None:
        """InvalidArgument unless the pages of a block table hold the KV of all these tokens."""
        text, prefix, width = array("I", tokens).tobytes(), salt, self.page_tokens * _WIDTH
        for index, at in enumerate(range(0, len(text), width)):
            page, part = self[table[index]], text[at : at + width]
            before, count = _HEAD.unpack_from(page)
            held = page[_HEAD.size :][: len(part)]
            if before != prefix or count * _WIDTH < len(part) or held != part:
                raise InvalidArgument(
                    f"page {table[index]} does not hold the KV of tokens {at // _WIDTH} to "
                    f"{(at + len(part)) // _WIDTH - 1} of this sequence"
                )
            prefix = zlib.crc32(part, prefix)

    def _prefix(self, table: Sequence[int], index: int, salt: int) -> int:
        """The CRC of all tokens before page ``index`` of a table, from the page before."""
        if not index:
            return salt
        page = self[table[index - 1]]
        return zlib.crc32(page[_HEAD.size :], _HEAD.unpack_from(page)[0])

"""The revocation ids that no longer count, kept in the state folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.errors import AccessDenied, InvalidArgument

ID = re.compile(r"[0-9a-f]{64,512}")


def check_id(id: str) -> str:
    """A revocation id as it is; InvalidArgument if it cannot be one."""
    if not ID.fullmatch(id):
        raise InvalidArgument("a revocation id is 64 to 512 hexadecimal digits in lower case")
    return id


class Revocations(Set[str]):
    """A set of revocation ids that outlives the process; written in one step, readable by the owner only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids = set(_read(path))

    def __contains__(self, id: object) -> bool:
        return id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Iterable[str]) -> None:
        """Revoke these ids; when this returns they are on disk."""
        together = self._ids | {check_id(id) for id in ids}
        paths.write_private(self._path, "".join(f"{id}\n" for id in sorted(together)).encode())
        self._ids = together


def _read(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text().split()
    if not all(ID.fullmatch(line) for line in lines):
        # Going on with part of the list would let revoked tokens in.
        raise AccessDenied(f"{path} is damaged: restore it from a copy; audit.log names what was revoked")
    return lines

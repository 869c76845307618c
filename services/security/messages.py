"""The messages on the link to security."""

from __future__ import annotations

from typing import Literal

import msgspec

from llmos.ipc.grant import Grant
from llmos.kernel.messages import Verified, Verify

__all__ = [
    "Mint",
    "Minted",
    "RevokeToken",
    "Revoked",
    "StorageKey",
    "StorageKeyQuery",
    "Verified",
    "Verify",
]


class Mint(msgspec.Struct, frozen=True):
    """Make a token for these rights; they must lie within the caller's. ``grant.chain`` is ignored."""

    grant: Grant


class Minted(msgspec.Struct, frozen=True):
    """A token, and the revocation ids that undo it."""

    token: str
    ids: list[str]


class RevokeToken(msgspec.Struct, frozen=True):
    """Revoke a token and all that was derived from it, by the token or by a revocation id."""

    token: str = ""
    id: str = ""


class Revoked(msgspec.Struct, frozen=True):
    """How many grants were removed and calls ended; nothing runs under them any more."""

    grants: int
    calls: int


class StorageKeyQuery(msgspec.Struct, frozen=True):
    """Ask for the key that seals what a tenant's data leaves RAM as; for drivers only."""

    tenant: str
    purpose: Literal["pages", "tasks"]


class StorageKey(msgspec.Struct, frozen=True):
    """32 bytes; never logged, kept in memory only."""

    key: bytes

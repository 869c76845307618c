"""The messages on the link to security."""

from __future__ import annotations

import msgspec

from llmos.ipc.grant import Grant
from llmos.kernel.messages import Verified, Verify

__all__ = ["Mint", "Minted", "RevokeToken", "Revoked", "Verified", "Verify"]


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

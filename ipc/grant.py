"""What a capability allows, and the origin that the kernel stamps on every call it delivers."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import msgspec

from llmos.ipc.errors import AccessDenied, ProtocolError

Band = Literal["realtime", "interactive", "batch"]
BANDS: tuple[Band, ...] = ("realtime", "interactive", "batch")

ANY = "*"


class Grant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rights behind a handle.

    ``calls`` holds "service.method" or "service.*"; ``models`` model names or "*". ``band`` is the highest
    priority band allowed. ``expires`` is in microseconds since the Unix epoch; for it and every limit, 0
    means none. ``chain`` holds the revocation ids of the token, outermost last: revoking any of them revokes
    this grant. ``serves`` is the name that a service or driver may register.
    """

    principal: str
    tenant: str
    calls: list[str] = []
    models: list[str] = []
    band: Band = "interactive"
    expires: int = 0
    max_tokens: int = 0
    max_running: int = 0
    max_queued: int = 0
    max_pages: int = 0
    tokens_per_minute: int = 0
    weight: float = 1.0
    chain: list[str] = []
    serves: str = ""

    def may_use(self, model: str) -> bool:
        return ANY in self.models or model in self.models

    def may_run_in(self, band: Band) -> bool:
        return BANDS.index(band) >= BANDS.index(self.band)


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Who a call comes from; written by the kernel alone, as the last frame of a delivered message."""

    connection: int
    grant: Grant

    def check_model(self, model: str) -> None:
        """AccessDenied unless this caller may use the model."""
        if not self.grant.may_use(model):
            raise AccessDenied(f"this capability does not allow the model {model!r}")


_decoder = msgspec.msgpack.Decoder(Origin)


@lru_cache(maxsize=4096)
def decode_origin(frame: bytes) -> Origin:
    """The origin in a frame; cached, since a connection stamps the same bytes on all its calls."""
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed origin: {error}") from None

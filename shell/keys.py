"""``llmos cap``: a key for others to use."""

from __future__ import annotations

import argparse
import getpass
import re
import time

from llmos.ipc.errors import InvalidArgument
from llmos.ipc.grant import Grant
from llmos.services.security.messages import Mint, Minted
from llmos.shell import session

CALLS = [
    "models.chat", "models.complete", "models.embed", "models.rerank", "models.classify", "models.list",
]  # fmt: skip
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def cap(options: argparse.Namespace) -> int:
    """Have security make a key, and print it and nothing else."""
    with session.connect() as client:
        grant = Grant(
            principal=f"{_user()}/key",
            tenant=options.tenant or client.grant.tenant,
            calls=CALLS,
            models=[name.strip() for name in options.models.split(",") if name.strip()],
            band=options.band,
            expires=_expiry(options.ttl, time.time()),
            max_tokens=options.max_tokens,
            tokens_per_minute=options.tokens_per_minute,
            max_running=options.max_running,
            max_queued=options.max_queued,
            max_pages=options.max_pages,
        )
        minted = client.call("security.mint", Mint(grant), Minted)
    print(minted.token)
    return 0


def _expiry(ttl: str, now: float) -> int:
    """A span such as "12h" from ``now`` on, as microseconds since the Unix epoch; 0 for none."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", ttl)
    if match is None:
        raise InvalidArgument(f"--ttl {ttl!r}: write a number and s, m, h or d, such as 12h")
    span = int(match[1]) * UNITS[match[2]]
    return int((now + span) * 1e6) if span else 0


def _user() -> str:
    """Who is at the keyboard, in the letters that a principal may have."""
    try:
        return re.sub(r"[^A-Za-z0-9._@-]", "-", getpass.getuser())[:64]
    except (KeyError, OSError):
        return "local"

"""How long a key is valid."""

from __future__ import annotations

import pytest

from llmos.ipc.errors import InvalidArgument
from llmos.shell.keys import _expiry


@pytest.mark.parametrize(
    ("ttl", "span"), [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000)]
)
def test_a_span_is_counted_from_now(ttl: str, span: int) -> None:
    assert _expiry(ttl, 1000.0) == (1000 + span) * 1_000_000


def test_zero_is_for_ever() -> None:
    assert _expiry("0", 1000.0) == 0


@pytest.mark.parametrize("ttl", ["", "-1", "1w", "1.5h", "h", "99999999999"])
def test_anything_else_is_refused(ttl: str) -> None:
    with pytest.raises(InvalidArgument, match="--ttl"):
        _expiry(ttl, 0.0)

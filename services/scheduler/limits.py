"""What a tenant may have: tokens per minute, by a token bucket. Pure; running, queued and pages are counted
where they change hands, in ``host``, ``queue`` and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TENANTS = 65_536


@dataclass(slots=True)
class Bucket:
    """``level`` tokens could be asked for at ``at``; it fills by ``rate`` a second up to a minute's worth."""

    rate: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level = min(60.0 * self.rate, self.level + self.rate * (now - self.at))
        self.at = now


Note = Callable[[str, dict[str, Bucket]], None]


class RateLimits:
    """A token bucket (RFC 2697's committed rate, one colour) for each tenant that has a limit.

    ``buckets`` are those of an earlier scheduler; ``note`` is told whose has changed.
    """

    def __init__(self, buckets: dict[str, Bucket] | None = None, note: Note = lambda *_: None) -> None:
        self._buckets = buckets or {}
        self._note = note

    def wait(self, tenant: str, per_minute: int, tokens: int, now: float) -> float:
        """Seconds until so many tokens may be asked for; infinite where a full minute's are not enough."""
        if not per_minute:
            return 0.0
        if tokens > per_minute:
            return float("inf")
        bucket = self._bucket(tenant, per_minute, now)
        return max(0.0, (tokens - bucket.level) / bucket.rate)

    def take(self, tenant: str, per_minute: int, tokens: int, now: float) -> None:
        """Charge a request that was let in."""
        if per_minute:
            self._bucket(tenant, per_minute, now).level -= tokens
            self._note(tenant, self._buckets)

    def give_back(self, tenant: str, tokens: int) -> None:
        """What a task asked for and did not use."""
        if (bucket := self._buckets.get(tenant)) is not None:
            bucket.level = min(60.0 * bucket.rate, bucket.level + tokens)
            self._note(tenant, self._buckets)

    def _bucket(self, tenant: str, per_minute: int, now: float) -> Bucket:
        bucket = self._buckets.get(tenant)
        if bucket is None:
            if len(self._buckets) >= TENANTS:
                self._forget_full(now)
            bucket = self._buckets[tenant] = Bucket(per_minute / 60.0, float(per_minute), now)
        bucket.refill(now)
        if bucket.rate != per_minute / 60.0:
            bucket.rate = per_minute / 60.0
            bucket.level = min(bucket.level, float(per_minute))
        return bucket

    def _forget_full(self, now: float) -> None:
        """A full bucket says no more than none does."""
        for tenant, bucket in list(self._buckets.items()):
            bucket.refill(now)
            if bucket.level >= 60.0 * bucket.rate:
                del self._buckets[tenant]

"""What the tenants used of their tokens per minute, in a file of the run folder that outlives the scheduler.

A line for each change, the newest of a tenant counts; what was written before a ``kill -9`` is in the file.
Times are of the monotonic clock, which the processes of one boot share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from llmos.ipc import paths
from llmos.services.scheduler.limits import Bucket

FILE = "charges"
SPARE = 16_384  # lines beyond one for each tenant, before the file is written anew


class Charges:
    """The file of one scheduler."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._file = -1
        self._lines = 0

    def read(self, now: float) -> dict[str, Bucket]:
        """What an earlier scheduler of this boot left; a line that was cut off is passed over."""
        found: dict[str, Bucket] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                tenant, rate, level, at = json.loads(line)
                bucket = Bucket(float(rate), float(level), float(at))
            except (ValueError, TypeError):
                continue
            if bucket.at <= now:
                found[str(tenant)] = bucket
        self.keep(found)
        return found

    def keep(self, buckets: dict[str, Bucket]) -> None:
        """Write the file anew, with what counts."""
        self.close()
        paths.write_private(self._path, b"".join(_line(*entry) for entry in buckets.items()))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._lines = 0

    def note(self, tenant: str, buckets: dict[str, Bucket]) -> None:
        """A tenant's bucket has changed."""
        if self._lines > SPARE + len(buckets):
            self.keep(buckets)
        os.write(self._file, _line(tenant, buckets[tenant]))
        self._lines += 1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _line(tenant: str, bucket: Bucket) -> bytes:
    return json.dumps([tenant, bucket.rate, bucket.level, bucket.at]).encode() + b"\n"

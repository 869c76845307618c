"""The simulator's KV cache: what its pages would hold in each tier, and how long copying them takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmos.drivers.sdk.messages import Tier
from llmos.services.memory.messages import Batch

DEVICE_SPEED = 1.5e12  # bytes per second of a gather or scatter on the device


@dataclass(frozen=True)
class LinkTime:
    """Seconds to copy bytes between tiers: ``latency``, and bytes per second each way at once. The defaults
    are host memory and a fast disk beside an H200."""

    host: float = 50e9
    disk: float = 5e9
    latency: float = 1.0e-4

    def of(self, batch: Batch, page_bytes: int) -> float:
        speed = self.disk if "disk" in (batch.source, batch.target) else self.host
        return self.latency + len(batch.pages) * page_bytes / speed


@dataclass
class Pages:
    """Which tokens the KV in each page was computed from, by a hash of all tokens up to each. Not kept where
    ``checked`` is off: it costs more than all the rest of a simulation."""

    page_tokens: int
    checked: bool
    _tiers: dict[Tier, dict[int, dict[int, int]]] = field(default_factory=dict)

    def write(self, table: list[int], hashes: list[int], start: int, stop: int) -> None:
        """The KV of positions ``start`` to ``stop`` is computed."""
        device = self._tiers.setdefault("device", {})
        for position in range(start, stop) if self.checked else ():
            page, offset = divmod(position, self.page_tokens)
            device.setdefault(table[page], {})[offset] = hashes[position]

    def check(self, table: list[int], hashes: list[int], count: int) -> None:
        """Fail unless the KV of the first ``count`` positions is where a sequence will read it."""
        device = self._tiers.setdefault("device", {})
        for position in range(count) if self.checked else ():
            page, offset = divmod(position, self.page_tokens)
            held = device.get(table[page], {}).get(offset)
            assert held == hashes[position], f"page {table[page]} does not hold position {position}"

    def read(self, tier: Tier, numbers: Iterable[int]) -> list[dict[int, int]]:
        pages = self._tiers.setdefault(tier, {})
        return [dict(pages.get(number, {})) for number in numbers] if self.checked else []

    def put(self, tier: Tier, numbers: Iterable[int], contents: list[dict[int, int]]) -> None:
        self._tiers.setdefault(tier, {}).update(zip(numbers, contents, strict=False))


def prefix_hashes(tokens: list[int], known: list[int] | None = None) -> list[int]:
    """A hash of all tokens up to each, going on from those that are known."""
    hashes = known if known is not None else []
    last = hashes[-1] if hashes else 0
    for token in tokens[len(hashes) :]:
        last = hash((last, token))
        hashes.append(last)
    return hashes

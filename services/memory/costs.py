"""Move or compute again? What pages of an arena cost, and how likely they are needed again. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmos.services.memory.radix import DEVICE, DISK, HOST, Node

REMEMBERED = 4096  # pages of a class
EVIDENCE = 64  # pages
CLASSES = 3  # pages used once, twice, more often


@dataclass(slots=True)
class Costs:
    """In microseconds; a page's are the sum over its tokens. ``compute`` 0: nothing is known, so moving is
    taken to be better. ``returned`` and ``dropped`` count, by how often they had been used, the pages that
    were needed again after they had left the device, and those that were not; old ones fade."""

    compute: float = 0.0
    fetch: dict[int, float] = field(default_factory=lambda: {DEVICE: 0.0, HOST: 0.0, DISK: 0.0})
    transfer: float = 0.0
    returned: list[float] = field(default_factory=lambda: [0.0] * CLASSES)
    dropped: list[float] = field(default_factory=lambda: [0.0] * CLASSES)

    def worth_having(self, nodes: Sequence[Node]) -> int:
        """How many of these nodes, from the first on, to use; the rest is cheaper to compute again."""
        if not self.compute:
            return len(nodes)
        best, cost, least, latency = 0, 0.0, 0.0, 0.0
        for count, node in enumerate(nodes, 1):
            latency = self.transfer if node.tier != DEVICE else latency
            cost += self.fetch[node.tier] - self.compute
            if cost + latency <= least:
                best, least = count, cost + latency
        return best

    def worth_keeping(self, node: Node, target: int) -> bool:
        """Whether to move a page down to a tier: what it would cost to compute it again, times how likely
        that is, against writing and fetching it."""
        return not self.compute or self.compute * self.likely(node) > 2.0 * self.fetch[target]

    def likely(self, node: Node) -> float:
        """The share of such pages that were needed again after they had left the device. What is still
        away decides nothing."""
        kind = _class(node.uses)
        returned, dropped = self.returned[kind], self.dropped[kind]
        return (returned + 1.0) / (returned + dropped + 1.0)

    def proven(self, node: Node) -> bool:
        """Whether most such pages were needed again, so that it is worth to wait for them to be saved. What
        is known of pages that were used less often holds for this one all the more."""
        kinds = range(_class(node.uses) + 1)
        return any(self.returned[k] >= EVIDENCE and self.returned[k] >= self.dropped[k] for k in kinds)

    def note_dropped(self, node: Node) -> None:
        """A page left another tier, and was not needed there."""
        self._note(self.dropped, _class(node.uses))

    def note_returned(self, nodes: Iterable[Node]) -> None:
        """These are held again, by a task that counts among their uses already."""
        for node in nodes:
            if node.tier != DEVICE:
                self._note(self.returned, _class(node.uses - 1))

    def _note(self, counts: list[float], kind: int) -> None:
        counts[kind] += 1.0
        if self.returned[kind] + self.dropped[kind] > REMEMBERED:
            self.returned[kind] /= 2.0
            self.dropped[kind] /= 2.0


def _class(uses: int) -> int:
    return max(0, min(uses, CLASSES) - 1)

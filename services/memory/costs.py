"""Move or compute again? What pages of an arena cost, and how likely they are needed again. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmos.services.memory.radix import DEVICE, DISK, HOST, Node

CLASSES = 3  # pages used once, twice, more often


@dataclass(slots=True)
class Costs:
    """In microseconds; a page's are the sum over its tokens. ``compute`` 0: nothing is known, so moving is
    taken to be better. ``demoted`` and ``returned`` count pages by how often they had been used."""

    compute: float = 0.0
    fetch: dict[int, float] = field(default_factory=lambda: {DEVICE: 0.0, HOST: 0.0, DISK: 0.0})
    transfer: float = 0.0
    demoted: list[int] = field(default_factory=lambda: [0] * CLASSES)
    returned: list[int] = field(default_factory=lambda: [0] * CLASSES)

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
        """The share of such pages that were needed again after they had left the device."""
        kind = _class(node)
        return min(1.0, (self.returned[kind] + 1) / (self.demoted[kind] + 1))

    def note_demoted(self, node: Node) -> None:
        self.demoted[_class(node)] += 1

    def note_returned(self, nodes: Iterable[Node]) -> None:
        """These are held again, by a task that counts among their uses already."""
        for node in nodes:
            if node.tier != DEVICE:
                self.returned[max(0, min(node.uses - 1, CLASSES) - 1)] += 1


def _class(node: Node) -> int:
    return max(0, min(node.uses, CLASSES) - 1)

"""Pages on their way between tiers: what a transfer holds until it is settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmos.drivers.sdk.messages import Tier
from llmos.services.memory import messages
from llmos.services.memory.radix import Node

if TYPE_CHECKING:
    from llmos.services.memory.arena import Task

TIERS: tuple[Tier, Tier, Tier] = ("device", "host", "disk")
Place = tuple[int, int]
"""A tier's index and a page or block in it."""


@dataclass(slots=True)
class Item:
    """One page: of a node of the index, or the tail of a task. ``counted`` is how often it counts as owned
    beyond what its tenant is charged for while it travels."""

    tenant: str
    source: Place
    target: Place
    node: Node | None
    task: Task | None = None
    counted: int = 1


@dataclass(slots=True)
class Transfer:
    """Batches are copied one after the other; ``task`` is whose they are and ``owner`` its id, ``pins`` the
    ends of the paths that are kept meanwhile."""

    id: int
    batches: list[list[Item]]
    task: Task | None = None
    owner: int = 0
    pins: list[Node] = field(default_factory=list)

    def message(self) -> messages.Transfer:
        """The transfer as the scheduler is told of it."""
        return messages.Transfer(self.id, [_batch(items) for items in self.batches])


def batches(items: Iterable[Item]) -> list[list[Item]]:
    """Items by source tier, target tier and tenant; each in the order in which they came."""
    found: dict[tuple[int, int, str], list[Item]] = {}
    for item in items:
        found.setdefault((item.source[0], item.target[0], item.tenant), []).append(item)
    return list(found.values())


def _batch(items: list[Item]) -> messages.Batch:
    first = items[0]
    return messages.Batch(
        TIERS[first.source[0]],
        TIERS[first.target[0]],
        [(item.source[1], item.target[1]) for item in items],
        first.tenant,
    )

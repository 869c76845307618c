"""What moving pages costs a host, as measured, and which transfers are open. Pure.

A link's speed is the bytes over the time of the moves seen on it, old ones fading; until one was seen it is
guessed high, because only what is tried is learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmos.drivers.sdk.messages import LoadedModel, Moved, Tier
from llmos.services.memory.messages import Batch, Costs, Transfer
from llmos.services.scheduler.steptime import StepTimes
from llmos.services.scheduler.task import Task

GUESS = {"host": 3e10, "disk": 3e9}  # bytes per second of a link that was never used
FADE = 0.9  # what is left of older moves when one is seen
TRANSFER = 1.0e-3  # seconds of messages that a transfer costs, however small
PATIENCE = (0.02, 1.0, float("inf"))  # seconds that a task of each band waits for another's pages to leave
SHORT = 1  # step of a quantum while pages are to be moved
TEACH = 1.25  # memory is told when a cost has changed by this factor


class Kind(Enum):
    """What a transfer is for."""

    OUT = "out"  # a task's pages leave the device
    IN = "in"  # a swapped task's pages come back
    HIT = "hit"  # a new task's prefix is fetched
    DEMOTE = "demote"  # cached pages leave the device


@dataclass(slots=True)
class Journey:
    """An open transfer. ``pages`` are the task's on the device: given up if it is OUT, else to be had;
    ``residence`` is the task's when it began."""

    kind: Kind
    task: Task | None = None
    residence: int = 0
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def valid(self) -> bool:
        """Whether its task still waits for it."""
        return self.task is None or self.task.residence == self.residence


class Links:
    """The speed of each link between two tiers."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Tier, Tier], tuple[float, float]] = {}

    def observe(self, batch: Batch, moved: Moved) -> None:
        """A batch took so long."""
        total, seconds = self._seen.get((batch.source, batch.target), (0.0, 0.0))
        seen = FADE * total + moved.bytes, FADE * seconds + max(moved.micros, 1) / 1e6
        self._seen[batch.source, batch.target] = seen

    def seconds(self, source: Tier, target: Tier, bytes: float) -> float:
        """How long so many bytes take."""
        total, seconds = self._seen.get((source, target), (0.0, 0.0))
        if total:
            return bytes * seconds / total
        return bytes / GUESS["disk" if "disk" in (source, target) else "host"]


@dataclass(eq=False)
class HostTiers:
    """The tiers of one host: its links, its open transfers, the tasks that are not on the device.

    ``away`` are the tasks whose pages are elsewhere or on their way; ``parked`` wait seated for pages that
    are leaving, with how many they lack; ``fetched`` came back ahead of their turn; ``hasty`` are ids of
    tasks that do not wait for cached pages to be saved.
    """

    model: LoadedModel
    links: Links = field(default_factory=Links)
    journeys: dict[int, Journey] = field(default_factory=dict)
    away: dict[int, Task] = field(default_factory=dict)
    parked: dict[int, tuple[Task, int]] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)
    # Device pages that will be free, by task, or by the negative of a transfer of cached pages.
    leaving: dict[int, int] = field(default_factory=dict)
    hasty: set[int] = field(default_factory=set)
    stale: set[int] = field(default_factory=set)  # transfers of a memory that went down
    demoting: bool = False
    taught: Costs | None = None

    @property
    def exist(self) -> bool:
        """Whether there is any tier beside the device that may be written now."""
        return bool(self.model.host_pages or self.model.disk_pages) and not self.stale

    @property
    def patience(self) -> int:
        """Steps that a quantum may have: pages are moved between quanta, and someone waits for them."""
        return SHORT if self.journeys else 1 << 30

    @property
    def coming(self) -> int:
        """Device pages that will be free soon and that nobody waits for yet."""
        return sum(self.leaving.values()) - sum(lacking for _, lacking in self.parked.values())

    def hurries(self, task: Task) -> bool:
        """Whether cached pages are dropped for a task at once, instead of being moved away before."""
        return bool(task.deadline and task.rank == 0) or task.id in self.hasty

    @property
    def tier(self) -> Tier:
        """Where swapped pages go."""
        return "host" if self.model.host_pages else "disk"

    def leave_seconds(self, pages: int) -> float:
        """Seconds until so many pages have left, behind those that are leaving already."""
        ahead = sum(self.leaving.values())
        return self.links.seconds("device", self.tier, (pages + ahead) * self.model.page_bytes)

    def swap_seconds(self, pages: int) -> float:
        """Seconds of the links to move so many pages away and back."""
        bytes = pages * self.model.page_bytes
        out = self.links.seconds("device", self.tier, bytes)
        return 2 * TRANSFER + out + self.links.seconds(self.tier, "device", bytes)

    def costs(self, arena: str, times: StepTimes) -> Costs:
        """What memory has to know, in microseconds."""
        chunk, page = self.model.chunk_tokens, self.model.page_bytes
        return Costs(
            arena=arena,
            token=times.seconds(0, 0, chunk) * 1e6 / chunk if times else 0.0,
            host=self.links.seconds("host", "device", page) * 1e6,
            disk=self.links.seconds("disk", "device", page) * 1e6,
            transfer=TRANSFER * 1e6,
        )

    def lesson(self, arena: str, times: StepTimes) -> Costs | None:
        """The costs, if they have changed much since memory was told."""
        costs = self.costs(arena, times)
        old = self.taught
        if old is not None and not any(
            _differ(a, b)
            for a, b in ((costs.token, old.token), (costs.host, old.host), (costs.disk, old.disk))
        ):
            return None
        self.taught = costs
        return costs


def swap_pays(tiers: HostTiers, times: StepTimes, task: Task, needy_rank: int) -> bool:
    """Keep a task's KV in another tier, or compute it again? Whichever takes less time, both ways counted,
    unless who needs the pages cannot wait for them to leave. The queue of the link counts for that alone: it
    keeps no device from working."""
    computed = task.computed
    if not tiers.exist or not computed:
        return False
    pages = -(-computed // tiers.model.page_tokens)
    if tiers.leave_seconds(pages) > PATIENCE[needy_rank]:
        return False
    return not times or tiers.swap_seconds(pages) < times.seconds(0, 0, computed)


def _differ(a: float, b: float) -> bool:
    return max(a, b) > TEACH * min(a, b)


__all__ = ["HostTiers", "Journey", "Kind", "Links", "Transfer", "swap_pays"]

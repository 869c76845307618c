"""One task, as plain state: what was asked, what was produced, where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmos.drivers.sdk.messages import Sampling
from llmos.ipc.grant import BANDS, Band
from llmos.services.scheduler.messages import Resume

GREEDY = Sampling()
PACE_SMOOTHING = 0.2
RANKS = {band: rank for rank, band in enumerate(BANDS)}


class Place(Enum):
    """Where a task is in its life."""

    WAITING = "waiting"  # in the queue, perhaps with pages it kept when it was displaced
    HELD = "held"  # another of its tenant is computing the prefix that it needs
    RESERVING = "reserving"  # chosen for a slot; memory has been asked for pages
    READY = "ready"  # has its pages and a slot; starts with the next quantum
    RUNNING = "running"  # on the device
    STOPPED = "stopped"  # by its owner; keeps its pages until someone needs them
    ENDED = "ended"


class Swap(Enum):
    """Where the pages are of a task that has none on the device."""

    NONE = "none"  # nowhere, or they are on the device
    OUT = "out"  # on their way from the device
    AWAY = "away"  # in host memory or on disk
    IN = "in"  # on their way to the device


@dataclass(eq=False, slots=True)
class Task:
    """A request as the scheduler sees it. Times are in seconds on a monotonic clock.

    ``tokens`` is the prompt and everything produced. While it is on a device: ``base`` tokens were known
    when it started there, ``prefilled`` of them will be computed when the quanta in flight are done, and it
    will then have ``planned`` tokens, or end before. ``residence`` counts how often it gave up its pages,
    ``stay`` how often it left a slot, ``ticket`` how often it was queued. ``bound`` is the host that promised
    to keep its deadline; ``names`` the prefixes of its prompt; ``promoted`` says that it waited so long that
    it counts as interactive while it has its slot. ``pace`` is how many tokens it gains in a step, lately:
    more than one where the driver speculates, so that ``planned`` is what it will have at least. ``context``
    belongs to who submitted it; ``resume`` says where its KV was saved, until it has been read. ``adapter``
    is empty for the model as it is. ``asked`` is how often pages of its pool had been given back when it
    asked for some, ``housed_at`` when it last got its first ones.
    """

    id: int
    tenant: str
    principal: str
    model: str
    band: Band
    tokens: list[int]
    prompt: int
    limit: int
    arrived: float
    sampling: Sampling = GREEDY
    stop: list[int] = field(default_factory=list)
    deadline: float = 0.0
    weight: float = 1.0
    max_running: int = 0
    max_pages: int = 0
    label: str = ""
    call: Any = None
    context: bytes = b""
    resume: Resume | None = None
    adapter: str = ""

    place: Place = Place.WAITING
    arena: str = ""
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    base: int = 0
    prefilled: int = 0
    planned: int = 0
    computed: int = 0
    committed: int = 0
    shared_pages: int = 0
    growing: bool = False
    pace: float = 1.0
    residence: int = 0
    stay: int = 0
    queued_at: float = 0.0
    started_at: float = 0.0
    first_token_at: float = 0.0
    first_cached: int = -1
    displaced: int = 0
    ticket: int = 0
    promoted: bool = False
    bound: str = ""
    names: list[int] | None = None
    swap: Swap = Swap.NONE
    asked: int = 0
    housed_at: float = 0.0

    @property
    def rank(self) -> int:
        """0 for realtime, 1 for interactive, 2 for batch: lower goes first."""
        return RANKS[self.band]

    @property
    def urgency(self) -> tuple[int, float]:
        """Lower goes first: the band, and in realtime the deadline. A promoted task counts as interactive."""
        if self.band == "realtime":
            return 0, self.deadline or float("inf")
        return (1 if self.promoted else self.rank), 0.0

    @property
    def kept(self) -> bool:
        """Whether what was computed for it is still somewhere."""
        return bool(self.pages) or self.swap is not Swap.NONE

    @property
    def produced(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.prompt

    def enter(self, cached: int) -> None:
        """Begin residence on a device, with the KV of ``cached`` tokens in place."""
        self.base = len(self.tokens)
        self.cached = self.prefilled = self.computed = cached
        self.planned = self.base

    def gain(self, tokens: int) -> None:
        """A step in which the task decoded gave it so many tokens; its plan knew of one."""
        if tokens:
            self.pace += PACE_SMOOTHING * (tokens - self.pace)
        self.planned = min(self.limit, max(self.planned + tokens - 1, len(self.tokens)))

    def settle(self, coming: int) -> None:
        """The quanta in flight give it ``coming`` tokens: plans give way to what really happened."""
        self.planned = min(self.limit, len(self.tokens) + coming)

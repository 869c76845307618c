"""The order of service: what another policy does otherwise, so that the simulator can compare them. Pure."""

from __future__ import annotations

from llmos.services.scheduler import displace
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.queue import Counters, TaskQueue
from llmos.services.scheduler.task import Task


class Order:
    """Ours. ``promises``: deadlines are promised or refused; ``shares``: a tenant's flood is held back;
    ``waits``: of equal prompts one is computed, and the others wait for it."""

    promises = True
    shares = True
    waits = True

    def queue(self, counters: Counters) -> TaskQueue:
        """Who is next."""
        return TaskQueue(counters)

    def prepare(self, host: Host) -> None:
        """A host is about to take work."""

    def for_slot(self, task: Task, running: list[Task]) -> Task | None:
        """Who gives up a slot."""
        return displace.for_slot(task, running)

    def for_pages(self, host: Host, task: Task, needed: int) -> Task | None:
        """Who gives up pages."""
        waiting = displace.keeper([t for t in host.keepers.values() if t is not host.favoured], task, needed)
        running = [t for t in host.running if t is not host.favoured]
        return waiting or displace.for_pages(task, running, needed)

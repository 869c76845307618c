"""What a tenant's flood leaves to others who ask for little: short steps, and a slot at once. Pure.

No order of service helps who is served at once and finds each step longer than before. So a tenant has a
share of the slots: ``SHARE`` of them times its weight. Interactive work beyond it may have whatever nobody
else needs. But while a tenant is here that is within its share and has nothing waiting, what is beyond rests:
it keeps its slots and pages and gains nothing. No slot is held free for those who may come: who is within
its share takes that of one who is beyond. Where all of them wait, virtual token counters say who is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from llmos.services.scheduler import displace
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Place, Task

SHARE = 0.25

Waits = Callable[[str], bool]


class Rows:
    """Who of the interactive band has how many slots of some hosts."""

    def __init__(self, hosts: Iterable[Host], share: float) -> None:
        hosts = list(hosts)
        self._tasks = [t for host in hosts for t in host.slots if t is not None and t.rank == 1]
        self._share = share * sum(host.model.slots for host in hosts)
        self._count = Counter(task.tenant for task in self._tasks)
        self._weight = {task.tenant: task.weight for task in self._tasks}

    def within(self, tenant: str, weight: float) -> bool:
        """Whether a tenant may have one more without being beyond its share."""
        return self._count[tenant] < self._most(weight)

    def light(self, tenant: str, waits: Waits) -> bool:
        """Whether another tenant is here that is within its share and has nothing waiting."""
        return any(
            other != tenant and self._count[other] <= self._most(weight) and not waits(other)
            for other, weight in self._weight.items()
        )

    def beyond(self) -> list[Task]:
        """What each tenant has beyond its share: its newest."""
        found = []
        for tenant, count in self._count.items():
            if count > (most := self._most(self._weight[tenant])):
                mine = [task for task in self._tasks if task.tenant == tenant]
                found += sorted(mine, key=displace.expendable)[most:]
        return found

    def _most(self, weight: float) -> int:
        return max(1, int(self._share * weight))


def resting(host: Host, share: float, waits: Waits) -> set[int]:
    """The ids of the tasks that gain nothing now."""
    if len(host.tenants) < 2 or max(host.tenants.values()) <= share * host.model.slots:
        return set()
    rows = Rows([host], share)
    return {task.id for task in rows.beyond() if rows.light(task.tenant, waits)}


def gives_way(host: Host, task: Task, share: float) -> Task | None:
    """Who is beyond its share, for an interactive task whose tenant is within its own; the newest."""
    if task.rank != 1:
        return None
    rows = Rows([host], share)
    if not rows.within(task.tenant, task.weight):
        return None
    return max((t for t in rows.beyond() if t.place is Place.RUNNING), key=displace.expendable, default=None)

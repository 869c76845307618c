"""What a tenant's flood leaves to others who ask for little: short steps, and a slot at once. Pure.

No order of service helps who is served at once and finds each step longer than before. So a tenant has a
share of the slots: ``SHARE`` of them times its weight. Interactive work beyond it may have whatever nobody
else needs. But while a tenant is here that is within its share and has nothing waiting, what is beyond rests:
it keeps its slots and pages and gains nothing. No slot is held free for those who may come: who is within
its share takes that of one who is beyond. Where all of them wait, virtual token counters say who is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llmos.services.scheduler.host import Host
from llmos.services.scheduler.rows import INTERACTIVE, age
from llmos.services.scheduler.task import Place, Task

SHARE = 0.25

Waits = Callable[[str], bool]


def most(slots: int, share: float, weight: float) -> int:
    """How many slots of so many a tenant may have."""
    return max(1, int(share * slots * weight))


def light(hosts: Iterable[Host], share: float, waits: Waits) -> set[str]:
    """Tenants that are within their share of these hosts and have nothing waiting; no more than two, which
    is enough to know whether there is another one."""
    found: set[str] = set()
    hosts = list(hosts)
    slots = sum(host.model.slots for host in hosts)
    for host in hosts:
        for tenant, tasks in host.rows.items():
            count = len(tasks) if len(hosts) == 1 else sum(each.rows.count(tenant) for each in hosts)
            if count <= most(slots, share, tasks[-1].weight) and not waits(tenant):
                found.add(tenant)
                if len(found) == 2:
                    return found
    return found


def resting(host: Host, share: float, waits: Waits) -> set[int]:
    """The ids of the tasks that gain nothing now: what each tenant has beyond its share, its newest."""
    slots = host.model.slots
    if len(host.tenants) < 2 or max(host.tenants.values()) <= share * slots:
        return set()
    calm = light([host], share, waits)
    return {
        task.id
        for tenant, tasks in host.rows.items()
        if calm - {tenant}
        for task in tasks[most(slots, share, tasks[-1].weight) :]
    }


def gives_way(host: Host, task: Task, share: float) -> Task | None:
    """Who is beyond its share, for an interactive task whose tenant is within its own; the newest."""
    slots = host.model.slots
    if task.rank != INTERACTIVE or host.rows.count(task.tenant) >= most(slots, share, task.weight):
        return None
    found: Task | None = None
    for _, tasks in host.rows.items():
        if len(tasks) > 1 and len(tasks) > (first := most(slots, share, tasks[-1].weight)):
            for each in reversed(tasks[first:]):
                if each.place is Place.RUNNING:
                    found = each if found is None else max(found, each, key=age)
                    break
    return found

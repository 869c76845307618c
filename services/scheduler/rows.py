"""The interactive tasks in a host's slots, by tenant, kept up to date as they come and go. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import ItemsView

from llmos.services.scheduler.task import Task

INTERACTIVE = 1


class Rows:
    """Each tenant's tasks, the oldest first; to come and to go costs O(log tasks) looks."""

    def __init__(self) -> None:
        self._tasks: dict[str, list[Task]] = {}

    def enter(self, task: Task) -> None:
        """A task has a slot; only the interactive band counts."""
        if task.rank == INTERACTIVE:
            insort(self._tasks.setdefault(task.tenant, []), task, key=age)

    def leave(self, task: Task) -> None:
        """A task has a slot no more, or another band."""
        mine = self._tasks.get(task.tenant, [])
        at = bisect_left(mine, age(task), key=age)
        if at < len(mine) and mine[at] is task:
            del mine[at]
            if not mine:
                del self._tasks[task.tenant]

    def count(self, tenant: str) -> int:
        """How many slots a tenant has."""
        return len(self._tasks.get(tenant, ()))

    def items(self) -> ItemsView[str, list[Task]]:
        """The tenants that have any, and what they have."""
        return self._tasks.items()


def age(task: Task) -> tuple[float, int]:
    """Higher is newer; within this band it is who gives way first."""
    return task.arrived, task.id

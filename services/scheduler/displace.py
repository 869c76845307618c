"""Who must give way when a slot or a page is short. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.services.scheduler.task import Place, Task


def for_slot(candidate: Task, running: Iterable[Task]) -> Task | None:
    """The task that gives its slot to a candidate of a higher band: the newest of the lowest band."""
    lower = [t for t in running if t.rank > candidate.rank and t.place is Place.RUNNING]
    return max(lower, key=_expendable, default=None)


def for_pages(needy: Task, running: Iterable[Task]) -> Task | None:
    """The task whose pages a needy one may have: of a lower band, or of the same and newer; else none."""
    lower = [t for t in running if t is not needy and _expendable(t) > _expendable(needy) and t.pages]
    return max(lower, key=_expendable, default=None)


def keeper(waiting: Iterable[Task], needy: Task) -> Task | None:
    """A waiting task that still keeps pages, to be had before anyone running is disturbed."""
    holders = [t for t in waiting if t.pages and t is not needy]
    return max(holders, key=_expendable, default=None)


def _expendable(task: Task) -> tuple[int, float, int]:
    return task.rank, task.arrived, task.id

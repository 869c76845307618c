"""Who must give way when a slot or a page is short. Pure.

Two rules bind every choice. Only the less urgent gives way: a lower band, in realtime a later deadline, and
for pages also who came later in the same band; so the first of the most urgent always goes on, and no two
tasks take from each other in turn. Within that, the choice is the cheapest: for a slot the newest, whose
pages stay (nothing is computed again unless somebody needs them); for pages the one with the least to
compute again among those whose pages are enough.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmos.services.scheduler.task import Place, Task


def for_slot(candidate: Task, running: Iterable[Task]) -> Task | None:
    """The task that gives its slot to a more urgent candidate: the newest of the least urgent."""
    urgency = candidate.urgency
    if urgency[0] > 1:
        return None
    lower = [t for t in running if t.place is Place.RUNNING and t.urgency > urgency]
    return max(lower, key=expendable, default=None)


def for_pages(needy: Task, running: Iterable[Task], needed: int = 1) -> Task | None:
    """The task whose pages a needy one may have: less urgent, or as urgent and newer; else none."""
    limit = expendable(needy)
    return _cheapest([t for t in running if t.pages and t is not needy and expendable(t) > limit], needed)


def keeper(keepers: Iterable[Task], needy: Task, needed: int = 1) -> Task | None:
    """A task without a slot that still keeps pages, to be had before anyone running is disturbed."""
    return _cheapest([t for t in keepers if t.pages and t is not needy], needed)


def expendable(task: Task) -> tuple[tuple[int, float], float, int]:
    """Higher gives way first."""
    return task.urgency, task.arrived, task.id


def _cheapest(tasks: list[Task], needed: int) -> Task | None:
    """Of the least urgent: the least to recompute among those with enough pages, else the most pages."""
    if not tasks:
        return None
    worst = max(task.urgency[0] for task in tasks)
    lowest = [task for task in tasks if task.urgency[0] == worst]
    enough = [task for task in lowest if len(task.pages) >= needed]
    if enough:
        return min(enough, key=lambda t: (t.computed, -t.arrived, -t.id))
    return max(lowest, key=lambda t: (len(t.pages), t.arrived, t.id))

"""Whether a task that is seated will last: long enough for what its displacement would cost. Pure.

Where memory is short, who is seated in the last free pages is displaced as soon as older tasks have grown,
and what was computed for it is lost. So once that has happened on a host, a task is seated only if the free
pages are enough for all who run there, and itself, for ``KEEP`` times as long as its tokens take to compute.
Where that is dear, tasks are seated like parcels; where it is cheap, memory is used to the last page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task

KEEP = 8.0


def stake(host: Host, task: Task) -> float:
    """Seconds that it takes to compute all tokens of a task again, or to move them away and back."""
    if not host.times:
        return 0.0
    chunk, tokens = host.model.chunk_tokens, len(task.tokens)
    again = tokens / chunk * host.times.seconds(0, 0, chunk)
    return min(again, host.tiers.swap_seconds(host.pages_for(tokens))) if host.tiers.exist else again


def due_back(host: Host, task: Task) -> float:
    """When a task will have had its pages for so long that little is lost with them."""
    return task.housed_at + KEEP * stake(host, task)


class Room(NamedTuple):
    """Pages that have to be free for a task to last, beside those that it asks for: for its own model, and
    for its neighbours where it is beyond its model's share."""

    spare: int = 0
    around: int = 0


def room(host: Host, neighbours: Iterable[Host], task: Task, extra: int) -> Room:
    """What a task that gets the pages of ``extra`` tokens beside its own needs to last."""
    step = _step(host)
    if not step:
        return Room()
    seconds = min(KEEP * stake(host, task), (task.limit - len(task.tokens)) * step)
    own = host.pages_for(len(task.tokens) + max(extra, int(seconds / step)))
    own -= host.pages_for(len(task.tokens) + extra)
    slabs = sum(-(-_growth(each, task, seconds) // each.model.slab_pages) for each in neighbours)
    return Room(own + _growth(host, task, seconds), slabs * host.model.slab_pages)


def _growth(host: Host, other: Task, seconds: float) -> int:
    """Pages that the tasks of a host will need in a time, but for those less urgent than another."""
    if not (step := _step(host)):
        return 0
    gained = int(seconds / step)
    return sum(
        max(0, host.pages_for(min(task.limit, len(task.tokens) + gained)) - len(task.pages))
        for task in host.slots
        if task is not None and task.pages and task.urgency <= other.urgency
    )


def _step(host: Host) -> float:
    return host.times.seconds(host.seated, 0, 0)

"""Can a deadline be kept? Asked of a forecast of all who were promised one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from llmos.services.scheduler.forecast import Job, Machine, finish_times

PROBES = 5


def all_in_time(jobs: Sequence[Job], machine: Machine, start: float) -> bool:
    """Whether every job's deadline is kept."""
    if _surely_in_time(jobs, machine, start):
        return True
    done = finish_times(jobs, machine, start)
    return all(done[job.id] <= job.deadline for job in jobs)


def _surely_in_time(jobs: Sequence[Job], machine: Machine, start: float) -> bool:
    """Whether all decode at once, and would be in time if each step were as long as the last could be."""
    rows, context = len(jobs), sum(job.context + job.decode for job in jobs)
    if rows > machine.slots or sum(job.pages for job in jobs) > machine.pages:
        return False
    longest = machine.step(rows + machine.others[0], context + machine.others[1], 0)
    for job in jobs:
        steps = max(1, job.decode)
        end = start + steps * longest * machine.stretch[steps.bit_length()]
        if job.prefill or end > job.deadline:
            return False
    return True


def does_no_harm(candidate: Job, admitted: Sequence[Job], machine: Machine, start: float) -> bool:
    """Whether the candidate's deadline is kept, and nobody is late who would not be as late without it: the
    forecast is cautious, and one whom it sees late by a little is no reason to refuse all others. All that
    both if those who may be later are and if they are not: then they are in the way of others."""
    ways = (True, False) if any(job.later for job in (candidate, *admitted)) else (True,)
    return all(_does_no_harm(candidate, admitted, machine, start, together) for together in ways)


def _does_no_harm(
    candidate: Job, admitted: Sequence[Job], machine: Machine, start: float, together: bool
) -> bool:
    done = finish_times([*admitted, candidate], machine, start, together=together)
    if done[candidate.id] > candidate.deadline:
        return False
    late = [job for job in admitted if done[job.id] > job.deadline]
    if not late:
        return True
    without = finish_times(admitted, machine, start, together=together)
    return all(done[job.id] <= without[job.id] for job in late)


def earliest(
    candidate: Job, admitted: Sequence[Job], machine: Machine, start: float, soonest: float = 0.0
) -> float:
    """A deadline for the candidate that could be promised now, close to the earliest such but not before
    ``soonest``; on the clock.

    The last of all deadlines is always possible, since nobody is behind it; below that by bisection.
    """

    def possible(deadline: float) -> bool:
        return does_no_harm(_due(candidate, deadline), admitted, machine, start)

    if soonest and possible(soonest):
        return soonest
    alone = finish_times([candidate], machine, start)[candidate.id]
    behind = finish_times([*admitted, _due(candidate, inf)], machine, start)[candidate.id]
    low, high = alone, max(behind, max((job.deadline for job in admitted), default=0.0))
    low, high = max(low, soonest), max(high, soonest)
    for _ in range(PROBES):
        middle = (low + high) / 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return high


def _due(job: Job, deadline: float) -> Job:
    return job._replace(deadline=deadline)

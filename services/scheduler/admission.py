"""Can a deadline be kept? Realtime tasks are run ahead of time, by deadline, on a host's clock. Pure.

The forecast is the composer's policy in fluid form: the first ``slots`` jobs by deadline are in the batch,
prompts are prefilled one after the other in chunks, as large as the earlier deadlines of those who decode
allow (``pacing``), everyone else gains a token a step, and a job that ends makes room for the next. Lower
bands are not in it: whenever a deadline is in danger they hold still.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

PROBES = 5
LATER = 2  # steps until who has its pages later than the others is in a quantum


class Job(NamedTuple):
    """What a realtime task still needs: tokens to prefill, steps to decode after that, pages to its end.

    ``deadline`` is on the same clock as everything else; ``context`` how many tokens it has now. Who is
    ``later`` has no pages yet, and may not be in the first steps.
    """

    id: int
    deadline: float
    prefill: int
    decode: int
    context: int
    pages: int
    later: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What the forecast knows of a host: ``step(rows, context, prefilled)`` in seconds, ``chunk(rows,
    context, seconds)`` the prompt tokens that fit in a step of so many seconds, its slots and pages;
    ``others`` are rows and context of lower bands in each step, ``turnover`` the steps until a slot that was
    given up is taken, ``share`` the part of the time to a deadline that prompts may use up; ``stretch`` how
    many times as long as forecast so many steps may take, by the bits of their number."""

    step: Callable[[float, float, float], float]
    chunk: Callable[[float, float, float], int]
    slots: int
    pages: int
    share: float = 1.0
    others: tuple[int, int] = (0, 0)
    turnover: int = 0
    stretch: Sequence[float] = (1.0,) * 32


def finish_times(
    jobs: Sequence[Job], machine: Machine, start: float, *, together: bool = False
) -> dict[int, float]:
    """When each job will be done at the latest, if the batch is theirs from ``start`` on; ``together`` if
    those who may be later are not. O(n log n)."""
    order = lambda job: (job.deadline, job.id)  # noqa: E731
    waiting = deque(sorted((job for job in jobs if together or not job.later), key=order))
    later = [] if together else [job for job in jobs if job.later]
    prefilling: deque[list[int]] = deque()
    decoding: list[tuple[int, float, int]] = []
    leaving: deque[tuple[int, int]] = deque()  # in which step a slot is free again, with how many pages
    known = {job.id: job for job in jobs}
    done: dict[int, float] = {}
    clock, step, rows, context, unfed = start, 0, 0, 0, 0
    slots, pages = machine.slots, machine.pages
    extra_rows, extra_context = machine.others
    stretch = machine.stretch
    while waiting or prefilling or decoding or later:
        if later and (step >= LATER or not (waiting or prefilling or decoding)):
            waiting, later = deque(sorted([*waiting, *later], key=order)), []
        while leaving and leaving[0][0] <= step:
            slots, pages = slots + 1, pages + leaving.popleft()[1]
        while waiting and slots and (waiting[0].pages <= pages or slots == machine.slots):
            job = waiting.popleft()
            slots, pages = slots - 1, pages - job.pages
            if job.prefill:
                prefilling.append([job.prefill, job.id])
                unfed += job.prefill
            else:
                heapq.heappush(decoding, (step + max(1, job.decode), job.deadline, job.id))
                rows, context = rows + 1, context + job.context
        count = decoding[0][0] - step if decoding else 1 << 30
        if waiting and leaving:
            count = min(count, leaving[0][0] - step)
        if later:
            count = min(count, LATER - step)
        room, fed = 0, 0
        if prefilling:
            last = known[prefilling[0][1]].deadline
            ahead = [
                (due - clock) / ((end - step) * stretch[(end - step).bit_length()])
                for end, due, _ in decoding
                if due < last
            ]
            seconds = machine.share * min(ahead, default=inf)
            room = machine.chunk(rows + extra_rows, context + extra_context, seconds)
            if room:
                count = min(count, -(-prefilling[0][0] // room))
                fed = min(room * count, unfed)
        read = context + extra_context + rows * count / 2
        clock += count * machine.step(rows + extra_rows + bool(fed), read, fed / count)
        step, context, unfed = step + count, context + rows * count, unfed - fed
        while fed and prefilling:
            used = min(fed, prefilling[0][0])
            fed -= used
            prefilling[0][0] -= used
            if prefilling[0][0]:
                break
            job = known[prefilling.popleft()[1]]
            # The step that completes a prompt gives the first token too.
            heapq.heappush(decoding, (step + job.decode, job.deadline, job.id))
            rows, context = rows + 1, context + job.context
        while decoding and decoding[0][0] <= step:
            job = known[heapq.heappop(decoding)[2]]
            done[job.id] = start + (clock - start) * stretch[step.bit_length()]
            rows, context = rows - 1, context - job.context - job.decode
            leaving.append((step + machine.turnover, job.pages))
    return done


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

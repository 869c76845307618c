"""When realtime tasks will be done: they are run ahead of time, by deadline, on a host's clock. Pure.

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

LATER = 2  # steps until who has its pages later than the others is in a quantum
_UNBOUNDED = 1 << 30  # steps


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
    return _Forecast(jobs, machine, start, together).run()


def _order(job: Job) -> tuple[float, int]:
    return job.deadline, job.id


class _Forecast:
    """The batch from ``start`` on, so many steps at a time as are alike."""

    __slots__ = (
        "clock", "context", "decoding", "done", "known", "later", "leaving", "machine", "pages",
        "prefilling", "rows", "slots", "start", "step", "unfed", "waiting",
    )  # fmt: skip

    def __init__(self, jobs: Sequence[Job], machine: Machine, start: float, together: bool) -> None:
        self.machine, self.start, self.clock, self.step = machine, start, start, 0
        self.waiting = deque(sorted((job for job in jobs if together or not job.later), key=_order))
        self.later = [] if together else [job for job in jobs if job.later]
        self.prefilling: deque[list[int]] = deque()  # tokens left, job
        self.decoding: list[tuple[int, float, int]] = []  # a heap: the step it ends in, deadline, job
        self.leaving: deque[tuple[int, int]] = deque()  # in which step a slot is free, with how many pages
        self.slots, self.pages = machine.slots, machine.pages
        self.rows = self.context = self.unfed = 0
        self.known = {job.id: job for job in jobs}
        self.done: dict[int, float] = {}

    def run(self) -> dict[int, float]:
        while self.waiting or self.prefilling or self.decoding or self.later:
            self._admit()
            count, fed = self._span()
            self._pass(count, fed)
            self._feed(fed)
            self._finish()
        return self.done

    def _admit(self) -> None:
        """Slots that are free go to whoever is first."""
        idle = not (self.waiting or self.prefilling or self.decoding)
        if self.later and (self.step >= LATER or idle):
            self.waiting, self.later = deque(sorted([*self.waiting, *self.later], key=_order)), []
        while self.leaving and self.leaving[0][0] <= self.step:
            self.slots, self.pages = self.slots + 1, self.pages + self.leaving.popleft()[1]
        waiting, all_free = self.waiting, self.machine.slots
        while waiting and self.slots and (waiting[0].pages <= self.pages or self.slots == all_free):
            job = waiting.popleft()
            self.slots, self.pages = self.slots - 1, self.pages - job.pages
            if job.prefill:
                self.prefilling.append([job.prefill, job.id])
                self.unfed += job.prefill
            else:
                self._decode(job, max(1, job.decode))

    def _decode(self, job: Job, steps: int) -> None:
        heapq.heappush(self.decoding, (self.step + steps, job.deadline, job.id))
        self.rows, self.context = self.rows + 1, self.context + job.context

    def _span(self) -> tuple[int, int]:
        """How many steps nothing changes in, and the prompt tokens that they take in all."""
        count = self.decoding[0][0] - self.step if self.decoding else _UNBOUNDED
        if self.waiting and self.leaving:
            count = min(count, self.leaving[0][0] - self.step)
        if self.later:
            count = min(count, LATER - self.step)
        room = self._room() if self.prefilling else 0
        if not room:
            return count, 0
        count = min(count, -(-self.prefilling[0][0] // room))
        return count, min(room * count, self.unfed)

    def _room(self) -> int:
        """The prompt tokens of a step, for the sake of those who decode and have an earlier deadline."""
        machine, stretch = self.machine, self.machine.stretch
        last = self.known[self.prefilling[0][1]].deadline
        ahead = [
            (due - self.clock) / ((end - self.step) * stretch[(end - self.step).bit_length()])
            for end, due, _ in self.decoding
            if due < last
        ]
        rows, context = machine.others
        seconds = machine.share * min(ahead, default=inf)
        return machine.chunk(self.rows + rows, self.context + context, seconds)

    def _pass(self, count: int, fed: int) -> None:
        rows, context = self.machine.others
        read = self.context + context + self.rows * count / 2
        self.clock += count * self.machine.step(self.rows + rows + bool(fed), read, fed / count)
        self.step, self.unfed = self.step + count, self.unfed - fed
        self.context += self.rows * count

    def _feed(self, fed: int) -> None:
        """So many tokens of prompts are computed; who has none left decodes."""
        while fed and self.prefilling:
            used = min(fed, self.prefilling[0][0])
            fed -= used
            self.prefilling[0][0] -= used
            if self.prefilling[0][0]:
                return
            job = self.known[self.prefilling.popleft()[1]]
            self._decode(job, job.decode)  # the step that completes a prompt gives the first token too

    def _finish(self) -> None:
        while self.decoding and self.decoding[0][0] <= self.step:
            job = self.known[heapq.heappop(self.decoding)[2]]
            stretch = self.machine.stretch[self.step.bit_length()]
            self.done[job.id] = self.start + (self.clock - self.start) * stretch
            self.rows, self.context = self.rows - 1, self.context - job.context - job.decode
            self.leaving.append((self.step + self.machine.turnover, job.pages))

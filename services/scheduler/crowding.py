"""How many deadlines a host promises at once, and how near they may be when it is busy. Pure.

Every promise can be kept and yet too much be promised: each step is as short as the tightest of those who
decode needs it, so prompts are computed slowly, slots hold prompts that wait, and a step's fixed cost is
shared by few. So while half of the slots are promised, a task has to bear nearly the pace at which the batch
is in balance: the steps in which as many prompts are computed as answers end. And once there are more
promises than slots by a seventh, only who is due after all of them gets another.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.scheduler.forecast import Job
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task

BUSY = 0.5  # of the slots, from which on the pace counts
TOLERANCE = 0.9  # of the balanced step that a task has to bear at least
MOST = 1.15  # promises for each slot
QUEUE = 4  # promises beyond the slots that there may be at least


@dataclass(frozen=True, slots=True)
class Crowd:
    """What promises leave to one more: ``pace`` is the step that it has to bear, ``latest`` the deadline
    of the last of them if no more may be made, ``token`` the seconds that a prompt token takes."""

    pace: float = 0.0
    latest: float = 0.0
    token: float = 0.0

    def soonest(self, job: Job, start: float) -> float:
        """The nearest deadline that may be promised, as far as the crowd goes."""
        own = start + self.token * job.prefill + self.pace * max(1, job.decode) if self.pace else 0.0
        return max(own, self.latest)


def crowd(host: Host, task: Task) -> Crowd:
    """The crowd that a task would join."""
    others, slots = list(host.promised.values()), host.model.slots
    if len(others) < BUSY * slots or not host.times:
        return Crowd()
    full = len(others) >= max(int(MOST * slots), slots + QUEUE)
    latest = max(each.deadline for each in others) if full else 0.0
    chunk = host.model.chunk_tokens
    token = host.times.seconds(0, 0, chunk) / chunk
    return Crowd(TOLERANCE * balanced(host, [*others, task]), latest, token)


def balanced(host: Host, tasks: list[Task]) -> float:
    """Seconds of a step that computes as many prompt tokens as these tasks bring in for each that they
    gain; of tasks that do not fit in the slots their mean."""
    part = min(1.0, host.model.slots / len(tasks))
    prompts = sum(task.prompt / max(1, task.limit - task.prompt) for task in tasks)
    context = sum(len(task.tokens) for task in tasks)
    return host.times.seconds(part * len(tasks), part * context, part * prompts)

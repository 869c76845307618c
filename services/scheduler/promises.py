"""Deadlines on a host: what is promised, whether one more can be, when lower bands must hold still. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from llmos.drivers.sdk.messages import Chunk
from llmos.ipc.errors import NoMemory, TimedOut
from llmos.services.scheduler import pacing
from llmos.services.scheduler.admission import all_in_time, does_no_harm, earliest
from llmos.services.scheduler.crowding import crowd
from llmos.services.scheduler.flight import InFlight
from llmos.services.scheduler.forecast import Job, Machine
from llmos.services.scheduler.host import QUANTA_IN_FLIGHT, STEPS_ON_DEVICE, Host
from llmos.services.scheduler.pacing import MESSAGES, SAFETY
from llmos.services.scheduler.task import Place, Task

COMING = (Place.WAITING, Place.HELD, Place.RESERVING)
TURNOVER = 1 + STEPS_ON_DEVICE  # steps until a slot that was given up is taken


def check(hosts: list[Host], task: Task, now: float) -> Host | None:
    """The first of these hosts that can keep the task's deadline and all it promised before.

    Raises TimedOut with ``earliest``, the seconds after which a deadline could be kept, or NoMemory with
    ``earliest`` where only the pages of other promises are in the way. None where nothing is known yet.
    """
    best, crowded = float("inf"), False
    for host in hosts:
        if not host.times:
            return None
        tasks = [task, *host.promised.values()]
        candidate, *admitted = _one_by_one(host, tasks, _jobs(host, tasks))
        start, machine = now + _lag(host), _machine(host, SAFETY)
        soonest = crowd(host, task).soonest(candidate, start)
        if task.deadline >= soonest:
            if does_no_harm(candidate, admitted, machine, start):
                return host
            roomy = replace(machine, pages=1 << 40)
            crowded = crowded or does_no_harm(candidate, admitted, roomy, start)
        best = min(best, earliest(candidate, admitted, machine, start, soonest) - now)
    if not hosts:
        return None
    message = f"the deadline in {task.deadline - now:.3f} s cannot be kept; one in {best:.3f} s could"
    if crowded:
        raise NoMemory(f"{message}: the pages are promised to others", earliest=round(best, 3))
    raise TimedOut(message, earliest=round(best, 3))


def in_crunch(host: Host, now: float, max_steps: int) -> bool:
    """Whether a promise would be broken if lower bands went on as they do."""
    promised = [task for task in host.promised.values() if task.place is not Place.STOPPED]
    if not promised or not host.times:
        return False
    jobs = _jobs(host, promised)
    others = [task for task in host.slots if task is not None and task.rank > 0]
    load = len(others), sum(len(task.tokens) for task in others)
    rows, context = len(jobs) + load[0], load[1] + sum(job.context for job in jobs)
    ahead = _stretched(host, QUANTA_IN_FLIGHT * max_steps, host.times.seconds(rows, context, 0))
    return not all_in_time(jobs, _machine(host, SAFETY, load), now + _lag(host) + ahead)


def _machine(host: Host, safety: float, others: tuple[int, int] = (0, 0)) -> Machine:
    def step(rows: float, context: float, prefilled: float) -> float:
        return safety * host.times.seconds(rows, context, prefilled)

    slots, pages = host.model.slots, host.guaranteed
    stretch = host.times.slippage.stretches()
    return Machine(step, partial(pacing.room, host), slots, pages, pacing.SHARE, others, TURNOVER, stretch)


def _lag(host: Host) -> float:
    """Until a quantum composed now begins: the steps that no preempt can take back, and messages, the last of
    them that of the end."""
    steps, prefilled = 0, 0
    for flight, count in _certain(host):
        steps += count
        prefilled += sum(chunk.length for chunk in _chunks(flight, count))
    if not steps:
        return MESSAGES + host.times.slippage.late
    context = sum(len(task.tokens) for task in host.slots if task is not None)
    # Of all ways to spread the prompts the longest: in one step.
    each, more = (host.times.seconds(host.seated, context, tokens) for tokens in (0, prefilled))
    return _stretched(host, steps, each + (more - each) / steps) + MESSAGES + host.times.slippage.late


def _stretched(host: Host, steps: int, each: float) -> float:
    """What so many steps may take."""
    return steps * each * (1.0 + host.times.slippage.share(steps))


def _certain(host: Host) -> Iterator[tuple[InFlight, int]]:
    """The quanta in flight, with how many of their next steps will be computed whatever comes."""
    left = STEPS_ON_DEVICE
    for flight in host.flight:
        count = min(left, flight.to_come)
        left -= count
        if count > 0:
            yield flight, count


def _chunks(flight: InFlight, count: int) -> Iterator[Chunk]:
    return (c for c in flight.quantum.chunks if flight.received <= c.step < flight.received + count)


def _jobs(host: Host, tasks: list[Task]) -> list[Job]:
    """What is left of each once the steps under way are done."""
    certain = [(flight, count, list(_chunks(flight, count))) for flight, count in _certain(host)]
    return [_job(host, task, certain if task.slot >= 0 else []) for task in tasks]


def _one_by_one(host: Host, tasks: list[Task], jobs: list[Job]) -> list[Job]:
    """Those who come together get their pages one after the other. So the newest, the first of these, finds
    the others decoding, at a pace that may leave its prompt no room; and where the device has nothing to do,
    these find the very first of them decoding."""
    coming = [task for task in tasks[1:] if task.place in COMING]
    first = min(coming, key=lambda task: (task.slot < 0, task.started_at, task.id), default=None)
    if first is None:
        return jobs
    late = {tasks[0]} if host.flight else {tasks[0], *coming} - {first}
    return [job._replace(later=task in late) for task, job in zip(tasks, jobs, strict=True)]


def _job(host: Host, task: Task, certain: list[tuple[InFlight, int, list[Chunk]]]) -> Job:
    """What is left of a task, assuming that no prefix of it is cached."""
    gained = computed = 0
    for flight, count, chunks in certain:
        gained += flight.coming(task, count)
        if chunks and flight.sitter(task.slot) is task:
            computed += sum(c.length for c in chunks if c.slot == task.slot)
    # Seated or keeping its pages: what was computed stays; else it has to be computed again.
    left = len(task.tokens) - task.computed
    prefill = 0 if left <= 1 and task.produced else max(0, left - computed)
    decode = task.limit - len(task.tokens) - gained - (1 if prefill else 0)
    context = len(task.tokens) + gained
    return Job(task.id, task.deadline, prefill, max(0, decode), context, host.pages_for(task.limit))

"""A host's state -> its next quantum. Pure: it reads and updates the plan of the tasks, and sends nothing."""

from __future__ import annotations

from llmos.drivers.sdk.messages import Chunk, Growth, Quantum, Start
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Place, Task


def compose(host: Host, id: int, max_steps: int) -> Quantum | None:
    """The next quantum of a host, or None where there is nothing to do.

    Prompts are prefilled in order of rank and arrival, at most ``chunk_tokens`` of them in a step; a quantum
    that prefills is as long as its chunks need, so that new arrivals join soon. Everyone else decodes in
    every step, except who lacks the pages for all of them.
    """
    starts = [task for task in host.starting if task.place is Place.READY]
    for task in starts:
        task.place = Place.RUNNING
    tasks = [task for task in host.running if task.place is Place.RUNNING]
    chunks, last_step = _prefill(host, tasks, max_steps)
    steps = _length(host, tasks, chunks, last_step, max_steps)
    decode = [task.slot for task in tasks if _decode(host, task, last_step.get(task.slot), steps)]
    if not (steps or starts or host.releasing):
        return None
    quantum = Quantum(
        id=id,
        model=host.model.model,
        steps=steps,
        release=host.releasing,
        start=[_start(task) for task in starts],
        grow=[Growth(slot, pages) for slot, pages in host.growth.items()],
        chunks=chunks,
        decode=decode,
    )
    host.starting, host.releasing, host.growth = [], [], {}
    return quantum


def _start(task: Task) -> Start:
    return Start(
        slot=task.slot,
        tokens=list(task.tokens),
        prompt=task.prompt,
        pages=list(task.pages),
        cached=task.cached,
        limit=task.limit,
        stop=task.stop,
        sampling=task.sampling,
    )


def _prefill(host: Host, tasks: list[Task], max_steps: int) -> tuple[list[Chunk], dict[int, int]]:
    """Chunks for the prompts that are not computed yet, and the step in which each of them is complete."""
    chunks: list[Chunk] = []
    complete: dict[int, int] = {}
    step, room = 0, host.model.chunk_tokens
    for task in sorted(tasks, key=lambda t: (t.rank, t.deadline or float("inf"), t.arrived)):
        while task.prefilled < task.base and step < max_steps:
            length = min(room, task.base - task.prefilled)
            chunks.append(Chunk(step, task.slot, task.prefilled, length))
            task.prefilled += length
            room -= length
            if task.prefilled == task.base:
                complete[task.slot] = step
            if room == 0:
                step, room = step + 1, host.model.chunk_tokens
    return chunks, complete


def _length(
    host: Host, tasks: list[Task], chunks: list[Chunk], complete: dict[int, int], max_steps: int
) -> int:
    """How many steps: as many as the chunks need, else as many as the longest decoder can use."""
    if chunks:
        return chunks[-1].step + 1
    useful = [_room(host, t) for t in tasks if t.prefilled == t.base and t.slot not in complete]
    return min(max_steps, max(useful, default=0))


def _room(host: Host, task: Task) -> int:
    """How many more tokens a task may produce in the pages it has."""
    return max(0, min(task.limit, host.capacity(task)) - task.planned)


def _decode(host: Host, task: Task, completes: int | None, steps: int) -> bool:
    """Whether a task decodes in this quantum; if so, its plan advances."""
    if task.prefilled < task.base:
        return False
    gain = steps if completes is None else steps - completes
    room = _room(host, task)
    if room < min(gain, task.limit - task.planned):
        if completes is not None:
            task.planned += 1
        return False
    task.planned = min(task.limit, task.planned + gain)
    return gain > 0 and (room > 0 or completes is not None)

"""A host's state -> its next quantum. Pure: it reads and updates the plan of the tasks, and sends nothing."""

from __future__ import annotations

from llmos.drivers.sdk.messages import Chunk, Growth, Quantum, Start
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.pacing import Paces, finest
from llmos.services.scheduler.task import Place, Task

STEP_BUDGET = (0.015, 0.065, 0.250)  # seconds of a step while a task of each band decodes
STRETCH = (1.5, 2.0, 2.0)  # a step without prefill may take longer than that; then so much longer with it
SOLO = 1.5  # others hold still for a realtime start where the step would else take so much longer
FULL = 2048  # tokens of a chunk from which on prompts gain nothing by what is decoded beside them
PATIENCE = 5.0  # seconds that batch tasks hold still at most for steps full of prompts
ALERT = 10.0  # seconds for which steps stay short after a task of a band has started


def compose(host: Host, id: int, max_steps: int, now: float) -> Quantum | None:
    """The next quantum of a host, or None where there is nothing to do.

    Prompts are prefilled in order of urgency and arrival, in each step as many of their tokens as the budget
    of those who decode allows; a quantum that prefills is as long as its chunks need, so that new arrivals
    join soon. Everyone else decodes in every step, except who lacks the pages for all of them, and in a
    crunch, or while a realtime task starts, everyone who is not realtime; and batch tasks among themselves
    while prompts fill whole steps.
    """
    starts = [task for task in host.starting if task.place is Place.READY]
    for task in starts:
        task.place = Place.RUNNING
        host.started[task.rank] = now
        host.unstarted.pop(task.id, None)
    tasks = [task for task in host.slots if task is not None and task.place is Place.RUNNING]
    host.solo = _starts_alone(host, starts, tasks)
    lowest = 0 if host.crunch or host.solo else 2
    active = tasks if lowest == 2 else [task for task in tasks if task.rank <= lowest]
    if host.resting:
        active = [task for task in active if task.id not in host.resting]
    still = _prompts_first(host, active, now)
    chunks, last_step = _prefill(host, active, 1 if still else max_steps, now)
    steps = _length(host, active, chunks, last_step, max_steps)
    size = host.model.page_tokens
    ready = [task for task in active if task.slot in last_step] if still else active
    decode = [task.slot for task in ready if _decode(task, size, last_step.get(task.slot), steps)]
    host.decoded = host.decoded if still else now
    if not (steps or starts or host.releasing):
        if not host.flight:
            host.times.rest()
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
        replica=host.replica,
    )
    host.starting, host.releasing, host.growth = [], [], {}
    return quantum


def _starts_alone(host: Host, starts: list[Task], tasks: list[Task]) -> bool:
    """Whether the others hold still for the one step that gives a realtime task its first token; not for a
    long prompt, not twice in a row, and not where their tokens come at little cost."""
    left = [task.base - task.prefilled for task in starts if task.rank == 0]
    if not left or host.solo or sum(left) > host.model.chunk_tokens:
        return False
    decoding = [len(task.tokens) for task in tasks if task.prefilled >= task.base]
    alone, beside = (
        host.times.seconds(*load, sum(left)) for load in ((0, 0), (len(decoding), sum(decoding)))
    )
    return beside >= SOLO * alone


def _prompts_first(host: Host, tasks: list[Task], now: float) -> bool:
    """Whether the next step is for prompts alone: where all is batch work and prompts fill a large step. A
    decode of few rows takes nearly as long as one of all, so the sooner all are there the better."""
    full = host.model.chunk_tokens
    if full < FULL or now - host.decoded >= PATIENCE or any(task.rank < 2 for task in tasks):
        return False
    left = sum(task.base - task.prefilled for task in tasks)
    return left >= full == decode_room(host, [], now)[1]


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
        adapter=task.adapter,
    )


def _prefill(host: Host, tasks: list[Task], max_steps: int, now: float) -> tuple[list[Chunk], dict[int, int]]:
    """Chunks for the prompts that are not computed yet, and the step in which each of them is complete."""
    chunks: list[Chunk] = []
    complete: dict[int, int] = {}
    todo = [task for task in tasks if task.prefilled < task.base]
    if not todo:
        return chunks, complete
    decoding = [task for task in tasks if task.prefilled >= task.base and task.planned < task.limit]
    rank, room = decode_room(host, decoding, now)
    paces = Paces(host, decoding, now)
    step, used, before = 0, 0, 0
    for task in sorted(todo, key=lambda t: (t.urgency, t.arrived, t.id)):
        if used and task.rank > before:
            step, used = step + 1, 0  # nobody waits for the prompts of a lower band
        before = task.rank
        # In realtime only deadlines count: its prompts are cut for the sake of promises, not of latency.
        limit = paces.room(task) if task.rank == 0 else host.model.chunk_tokens if task.rank < rank else room
        while task.prefilled < task.base and step < max_steps:
            if used >= limit:
                step, used = step + 1, 0
                continue
            length = min(limit - used, task.base - task.prefilled)
            chunks.append(Chunk(step, task.slot, task.prefilled, length))
            task.prefilled += length
            used += length
            if task.prefilled == task.base:
                complete[task.slot] = step
                if task.id in host.promised:
                    # From the next step on it decodes: prompts beside it are paced when they are composed.
                    max_steps = step + 1
    return chunks, complete


def decode_room(host: Host, decoding: list[Task], now: float) -> tuple[int, int]:
    """The most urgent band that decodes, or has started something lately and may again, and how many tokens
    a step may prefill for its sake: whoever comes next waits for the step that runs."""
    lately = [rank for rank, at in enumerate(host.started) if now - at < ALERT]
    rank = min([task.rank for task in decoding] + lately, default=2)
    context = sum(len(task.tokens) for task in decoding)
    return rank, chunk_room(host, rank, len(decoding), context)


def chunk_room(host: Host, rank: int, rows: float, context: float) -> int:
    """Prompt tokens that fit in a step beside ``rows`` of a band: halves of the largest chunk (few shapes
    to compile), such that the step stays within the band's budget, or within a multiple of what it takes
    anyway; never less than a page or a sixteenth."""
    full = host.model.chunk_tokens
    if not host.times or not (rows or rank < 2):
        return full
    least = finest(host)
    alone = host.times.seconds(rows, context, 0)
    budget = max(STEP_BUDGET[rank], STRETCH[rank] * alone)
    room = host.times.prefill_room(rows, context, budget)
    while full > room and full > least:
        full = max(least, full // 2)
    return full


def _length(
    host: Host, tasks: list[Task], chunks: list[Chunk], complete: dict[int, int], max_steps: int
) -> int:
    """How many steps: as many as the chunks need, else as many as the longest decoder can use."""
    if chunks:
        return chunks[-1].step + 1
    useful, size = 0, host.model.page_tokens
    for task in tasks:
        if task.prefilled == task.base and task.slot not in complete:
            useful = max(useful, _room(task, size))
            if useful >= max_steps:
                return max_steps
    return useful


def _room(task: Task, page_tokens: int) -> int:
    """How many more tokens a task may produce in the pages it has."""
    return max(0, min(task.limit, len(task.pages) * page_tokens) - task.planned)


def _decode(task: Task, page_tokens: int, completes: int | None, steps: int) -> bool:
    """Whether a task decodes in this quantum; if so, its plan advances."""
    if task.prefilled < task.base:
        return False
    gain = steps if completes is None else steps - completes
    left, room = task.limit - task.planned, _room(task, page_tokens)
    if room < gain and room < left:
        if completes is not None:
            task.planned += 1
        return False
    task.planned += gain if gain < left else left
    return gain > 0 and (room > 0 or completes is not None)

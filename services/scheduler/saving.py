"""Tasks that are written to files and go on from them. Their KV goes between driver and file directly."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmos.drivers.sdk.messages import RestoreTask, SaveTask, TaskSaved
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Busy, Canceled
from llmos.ipc.server import Incoming, Server, log
from llmos.services import saved
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.messages import Saved, TaskState
from llmos.services.scheduler.task import Place, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.server import Scheduler

Given = Callable[[list[int], int], None]
"""Takes a task's pages and how many of its first tokens have their KV in them."""


def save(scheduler: Scheduler, task: Task, call: Incoming, now: Callable[[], float]) -> None:
    """Stop a task, have a driver write it, and end it once the file is complete.

    Its pages are read behind the steps under way and before any later one, so it does not matter who gets
    them meanwhile. Busy, before any effect, where no driver could write it.
    """
    core = scheduler.core
    host = core.hosts.get(task.arena) or next(iter(core.hosts_of(task.model)), None)
    if host is None:
        raise Busy(f"no driver has the model {task.model!r} at the moment, so task {task.id} cannot be saved")
    core.stop(task, now())
    # Of a task that is swapped out only the tokens are written: computing them again is exact.
    computed = task.computed if task.pages and task.arena == host.arena else 0
    pages = task.pages[: host.pages_for(computed)]
    name = saved.new_name()
    request = SaveTask(
        name=name,
        model=task.model,
        tenant=task.tenant,
        pages=pages,
        digest=digest(task.tokens[:computed], task.adapter),
        state=codec.encode(state_of(task, computed if pages else 0)),
        replica=host.replica,
    )

    def answered(answer: Answer) -> None:
        if answer.error is not None:
            call.fail(answer.error)
            return
        written = codec.decode(answer.body, TaskSaved)
        if task.place is not Place.ENDED:
            core.kill(task, Canceled("the task was saved to a file: llmos cont FILE goes on"), now())
        call.reply(Saved(name, written.pages, written.bytes))

    scheduler.call(f"driver.{host.driver}.save", request, answered)


def fill(server: Server, host: Host, task: Task, pages: list[int], cached: int, given: Given) -> None:
    """Fill a resumed task's new pages from its file, behind those that memory found already.

    Where that fails the KV is computed again: the tokens are the same, it only takes longer.
    """
    resume, task.resume = task.resume, None
    size = host.model.page_tokens
    if resume is None or not cached < resume.computed <= len(task.tokens):
        given(pages, cached)
        return
    first, last = cached // size, host.pages_for(resume.computed)
    request = RestoreTask(
        name=resume.name,
        model=task.model,
        tenant=task.tenant,
        pages=pages[first:last],
        first=first,
        digest=digest(task.tokens[: resume.computed], task.adapter),
        replica=host.replica,
    )

    def answered(answer: Answer) -> None:
        if answer.error is not None:
            log.warning("the KV of task %d is computed again: %s", task.id, answer.error)
            given(pages, cached)
        else:
            # The last token is always computed: its logits are what the task continues from.
            given(pages, min(resume.computed, len(task.tokens) - 1))

    server.call(f"driver.{host.driver}.restore", request, answered)


def state_of(task: Task, computed: int) -> TaskState:
    """A task as it is saved."""
    return TaskState(
        model=task.model,
        tenant=task.tenant,
        tokens=task.tokens,
        prompt=task.prompt,
        limit=task.limit,
        stop=task.stop,
        sampling=task.sampling,
        band=task.band,
        label=task.label,
        context=task.context,
        computed=computed,
        adapter=task.adapter,
    )


def digest(tokens: list[int], adapter: str = "") -> bytes:
    """What names the tokens, and the adapter, whose KV a file has."""
    return hashlib.sha256(array("I", tokens).tobytes() + adapter.encode()).digest()

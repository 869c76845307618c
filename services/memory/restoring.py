"""An arena as its scheduler says it is, for a memory that was started anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from llmos.ipc.errors import InvalidArgument
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena, Task, pack
from llmos.services.memory.messages import Holding
from llmos.services.memory.slabs import SlabPool


def restore(message: messages.Restore, slabs: SlabPool | None = None) -> Arena:
    """An arena in which tasks hold what their scheduler says they hold; all else is free.

    Raises InvalidArgument where that cannot be: a page out of range, held twice by one task, held by two that
    do not share the tokens up to it, or in a slab that another arena holds.
    """
    arena = Arena(message.arena, slabs)
    sharing = Counter(page for holding in message.tasks for page in holding.pages)
    for holding in message.tasks:
        _check_holding(arena, holding)
        text, pages = pack(holding.tokens), list(holding.pages)
        task = Task(holding.tenant, holding.quota, text, pages, holding.adapter)
        task.computed = holding.computed
        for page in task.pages:
            if not arena.pool.holders[page]:
                arena.pool.claim(page)
        arena.hold(task.tenant, task.pages)
        arena.tasks[holding.task] = task
    for task in arena.tasks.values():
        _index_restored(arena, task, sharing)
    pages = [node.page for node in arena.index.nodes()]
    if len(set(pages)) < len(pages):
        raise InvalidArgument("a page is held for different tokens")
    for id, task in arena.tasks.items():
        for page in set(task.pages) - _on_path(task):
            if sharing[page] > 1:
                raise InvalidArgument(
                    f"page {page} of task {id} is held by another that has other tokens there"
                )
    return arena


def _on_path(task: Task) -> set[int]:
    """The pages that a task holds at their own place in the index."""
    node, found = task.path, set()
    for page in reversed(task.pages[: task.indexed]):
        assert node is not None
        if node.page == page:
            found.add(page)
        node = node.parent
    return found


def _check_holding(arena: Arena, holding: Holding) -> None:
    spec = arena.spec
    if holding.task in arena.tasks:
        raise InvalidArgument(f"task {holding.task} is named twice")
    if len(set(holding.pages)) < len(holding.pages) or any(not 0 <= p < spec.pages for p in holding.pages):
        raise InvalidArgument(
            f"task {holding.task} holds pages that are not {len(holding.pages)} different ones"
        )
    if holding.quota < 0:
        raise InvalidArgument(f"task {holding.task}: a quota of {holding.quota} pages")
    if not 0 <= holding.computed <= min(len(holding.tokens), len(holding.pages) * spec.page_tokens):
        raise InvalidArgument(
            f"task {holding.task}: {holding.computed} tokens cannot be computed in its pages"
        )


def _index_restored(arena: Arena, task: Task, sharing: Mapping[int, int]) -> None:
    """Lead a restored task's path from the root: a node keeps the page that several tasks share."""
    if task.computed >= arena.spec.page_tokens:
        arena.index_pages(task)
    node = task.path
    for page in reversed(task.pages[: task.indexed]):
        assert node is not None
        if sharing[page] > 1 and node.page != page and not arena.indexed[page]:
            arena.indexed[page], arena.indexed[node.page] = 1, 0
            node.page = page
        node = node.parent

"""What must hold after every operation on an arena; tests call it after each."""

from __future__ import annotations

from collections import Counter

from llmos.services.memory.arena import Arena
from llmos.services.memory.radix import Node


class Broken(AssertionError):
    """An invariant of the accounting does not hold."""


def check(arena: Arena) -> None:
    """Raise Broken unless every page is free, cached or owned, and every count is right."""
    nodes = list(arena.index.nodes())
    held = Counter(page for task in arena.tasks.values() for page in task.pages)
    _check_pages(arena, nodes, held)
    _check_tasks(arena, nodes)
    _check_index(arena, nodes)
    _check_counts(arena, nodes, held)


def _check_pages(arena: Arena, nodes: list[Node], held: Counter[int]) -> None:
    total, pool = arena.spec.pages, arena.pool
    indexed = {node.page for node in nodes}
    free = {page for page in range(total) if pool.is_free(page)}
    _equal("two nodes of the index have one page", len(indexed), len(nodes))
    _equal("pages marked as indexed", {p for p in range(total) if arena.indexed[p]}, indexed)
    _equal("a page is free and in use", free & (indexed | held.keys()), set())
    _equal("a page is nowhere", free | indexed | held.keys(), set(range(total)))
    _equal("free pages", pool.free, len(free))
    _equal("holders", {p: n for p, n in enumerate(pool.holders) if n}, dict(held))
    _equal("pages with several owners outside the index", {p for p in held if held[p] > 1} - indexed, set())


def _check_tasks(arena: Arena, nodes: list[Node]) -> None:
    size = arena.spec.page_tokens
    pins: Counter[int] = Counter()
    tenants: dict[int, str] = {}
    for name, task in arena.tasks.items():
        _equal(f"task {name} holds a page twice", len(set(task.pages)), len(task.pages))
        _equal(f"full pages of task {name} on its path", task.indexed, task.computed // size)
        node, key = task.path, task.tokens[: task.indexed * size].tobytes()
        path = b""
        while node is not None and node.parent is not None:
            pins[id(node)] += 1
            path = node.key + path
            node = node.parent
        _equal(f"tokens on the path of task {name}", path, key)
        for page in task.pages:
            _equal(
                f"page {page} is shared by two tenants", tenants.setdefault(page, task.tenant), task.tenant
            )
    for node in nodes:
        _equal("pins of a node", node.pins, pins[id(node)])
        _equal("tenant of a page in the index", tenants.get(node.page, node.tenant), node.tenant)


def _check_index(arena: Arena, nodes: list[Node]) -> None:
    _equal("evictable", arena.index.evictable, sum(node.pins == 0 for node in nodes))
    for node in nodes:
        if node.pins == 0 and any(child.pins for child in node.children.values()):
            raise Broken("an unpinned node has a pinned child")
        if node.pins == 0 and arena.pool.holders[node.page]:
            raise Broken(f"page {node.page} is owned and could be evicted")


def _check_counts(arena: Arena, nodes: list[Node], held: Counter[int]) -> None:
    usage = arena.usage()
    _equal("free + cached + owned", usage.free + usage.cached + usage.owned, usage.total)
    _equal("owned", usage.owned, len(held))
    _equal("cached", usage.cached, sum(arena.pool.holders[node.page] == 0 for node in nodes))
    owner = {page: task.tenant for task in arena.tasks.values() for page in task.pages}
    owned = Counter(owner.values())
    cached = Counter(node.tenant for node in nodes if node.page not in held)
    for line in usage.tenants:
        _equal(f"owned by {line.tenant}", line.owned, owned[line.tenant])
        _equal(f"cached for {line.tenant}", line.cached, cached[line.tenant])


def _equal(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise Broken(f"{what}: {actual} instead of {expected}")

"""What must hold after every operation on an arena; tests call it after each."""

from __future__ import annotations

from collections import Counter

from llmos.services.memory.arena import Arena
from llmos.services.memory.arenas import Arenas
from llmos.services.memory.radix import DEVICE, DISK, HOST, Node, lineage
from llmos.services.memory.slabs import SlabPages
from llmos.services.memory.transfers import TIERS, Item


class Broken(AssertionError):
    """An invariant of the accounting does not hold."""


def check(arena: Arena) -> None:
    """Raise Broken unless every page of every tier is free, cached or owned, and every count is right."""
    nodes = list(arena.index.nodes())
    resident = [node for node in nodes if node.tier == DEVICE]
    items = [item for t in arena.tiers.open.values() for items in t.batches for item in items]
    held = Counter(page for task in arena.tasks.values() for page in task.pages)
    held += Counter(n for item in items for tier, n in (item.source, item.target) if tier == DEVICE)
    _check_pages(arena, resident, held)
    _check_tasks(arena, nodes)
    _check_index(arena, nodes)
    _check_counts(arena, resident, held, items)
    _check_travel(arena, nodes, items)
    for tier in (HOST, DISK):
        _check_tier(arena, tier, nodes, items)


def check_all(arenas: Arenas) -> None:
    """``check`` for each arena, and for each pool that every slab is free or one arena's."""
    for arena in arenas:
        check(arena)
    for usage in arenas.pools():
        members = [arena for arena in arenas if arena.spec.pool == usage.pool]
        _equal("arenas of a pool", {arena.spec.arena for arena in members}, set(usage.arenas))
        slabs = Counter(
            page // arena.spec.slab_pages for arena in members for page in arena.pool.pages()
            if page % arena.spec.slab_pages == 0
        )  # fmt: skip
        _equal("slabs with two owners", [slab for slab, count in slabs.items() if count > 1], [])
        _equal("free slabs and those that are held", usage.free + len(slabs), usage.slabs)
        for arena in members:
            _check_slabs(arena)


def _check_slabs(arena: Arena) -> None:
    """What is known of each slab is what its pages say."""
    pool, size = arena.pool, arena.spec.slab_pages
    assert isinstance(pool, SlabPages)
    loose = {n.page for n in arena.index.nodes() if n.tier == DEVICE and not n.pins}
    for slab in range(arena.spec.slabs):
        pages = range(slab * size, (slab + 1) * size)
        in_use = sum(not pool.is_free(page) and page not in loose for page in pages)
        _equal(f"pages in use of slab {slab}", pool.in_use(slab), in_use if slab in pool.held else 0)
    for page, count in enumerate(pool.holders):
        if count and pool.slabs.holders[page // size] is not pool:
            raise Broken(f"page {page} is owned in a slab of another arena")


def _check_pages(arena: Arena, nodes: list[Node], held: Counter[int]) -> None:
    total, pool = arena.spec.pages, arena.pool
    indexed = {node.page for node in nodes}
    free = {page for page in range(total) if pool.is_free(page)}
    mine = set(pool.pages())
    _equal("two nodes of the index have one page", len(indexed), len(nodes))
    _equal("pages marked as indexed", {p for p in range(total) if arena.indexed[p]}, indexed)
    _equal("a page is free and in use", free & (indexed | held.keys()), set())
    _equal("a page is nowhere, or not this arena's", free | indexed | held.keys(), mine)
    _equal("all pages", pool.total, len(mine))
    _equal("free pages", pool.free, len(free))
    _equal("holders", {p: n for p, n in enumerate(pool.holders) if n}, dict(held))
    tasks = Counter(page for task in arena.tasks.values() for page in task.pages)
    _equal("pages with several owners outside the index", {p for p in tasks if tasks[p] > 1} - indexed, set())


def _check_tasks(arena: Arena, nodes: list[Node]) -> None:
    size = arena.spec.page_tokens
    pins: Counter[int] = Counter()
    tenants: dict[int, str] = {}
    for transfer in arena.tiers.open.values():
        for end in transfer.pins:
            pins.update(id(node) for node in lineage(end))
    for name, task in arena.tasks.items():
        _equal(f"task {name} is away", arena.tiers.away.get(name) is task, task.away)
        _equal(f"task {name} is away and has pages", task.away and bool(task.pages), False)
        _equal(f"task {name} has a tail and is not away", task.tail is not None and not task.away, False)
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
        if node.tier == DEVICE:
            _equal("tenant of a page in the index", tenants.get(node.page, node.tenant), node.tenant)


def _check_index(arena: Arena, nodes: list[Node]) -> None:
    for tier in (DEVICE, HOST, DISK):
        mine = [node for node in nodes if node.tier == tier]
        _equal("unpinned", arena.index.unpinned[tier], sum(node.pins == 0 for node in mine))
        loose, pinned = Counter[str](), Counter[str]()
        for node in mine:
            (pinned if node.pins else loose)[node.tenant] += 1
        _equal("unpinned by tenant", +arena.index.loose[tier], loose)
        _equal("pinned by tenant", +arena.index.pinned[tier], pinned)
    for node in nodes:
        near = Counter(child.tier for child in node.children.values())
        _equal("children by tier", node.near, [near[tier] for tier in (DEVICE, HOST, DISK)])
        if node.pins == 0 and any(child.pins for child in node.children.values()):
            raise Broken("an unpinned node has a pinned child")
        if node.tier == DEVICE and node.pins == 0 and arena.pool.holders[node.page]:
            raise Broken(f"page {node.page} is owned and could be evicted")


def _check_counts(arena: Arena, nodes: list[Node], held: Counter[int], items: list[Item]) -> None:
    usage = arena.usage()
    _equal("free + cached + owned", usage.free + usage.cached + usage.owned, usage.total)
    _equal("owned", usage.owned, len(held))
    _equal("cached", usage.cached, sum(arena.pool.holders[node.page] == 0 for node in nodes))
    owner = {page: task.tenant for task in arena.tasks.values() for page in task.pages}
    for item in items:
        owner |= {n: item.tenant for tier, n in (item.source, item.target) if tier == DEVICE}
    owned = Counter(owner.values())
    cached = Counter(node.tenant for node in nodes if node.page not in held)
    for line in usage.tenants:
        _equal(f"owned by {line.tenant}", line.owned, owned[line.tenant])
        _equal(f"cached for {line.tenant}", line.cached, cached[line.tenant])


def _check_travel(arena: Arena, nodes: list[Node], items: list[Item]) -> None:
    """What is on its way is where its transfer says, and nowhere twice."""
    busy = {id(node) for node in nodes if node.busy}
    travelling = [item.node for item in items if item.node is not None]
    _equal("busy nodes", busy, {id(node) for node in travelling})
    _equal("a node travels twice", len(busy), len(travelling))
    for item in items:
        if item.node is not None:
            _equal("where a travelling page is", (item.node.tier, item.node.page), item.source)
    targets = [item.target for item in items]
    _equal("two pages travel to one place", len(set(targets)), len(targets))
    _equal("moving", arena.tiers.moving, len(items))


def _check_tier(arena: Arena, tier: int, nodes: list[Node], items: list[Item]) -> None:
    """Every block of a tier is free, a node's, the tail of a task, or held by a transfer; never two of it."""
    pool = arena.tiers.pools[tier]
    mine = [node for node in nodes if node.tier == tier]
    apart = [(task.tail, task.tenant) for task in arena.tasks.values() if task.tail is not None]
    for item in items:
        apart.append((item.target, item.tenant))
        if item.node is None:
            apart.append((item.source, item.tenant))
    others = [(number, tenant) for (place, number), tenant in apart if place == tier]
    used = [node.page for node in mine] + [number for number, _ in others]
    free = {block for block in range(pool.total) if pool.is_free(block)}
    _equal(f"blocks with two owners in tier {tier}", [b for b, n in Counter(used).items() if n > 1], [])
    _equal(f"blocks free and in use in tier {tier}", free & set(used), set())
    _equal(f"blocks nowhere in tier {tier}", free | set(used), set(range(pool.total)))
    _equal(f"free blocks in tier {tier}", pool.free, len(free))
    for line in (line for line in arena.tiers.usage() if line.tier == TIERS[tier]):
        _equal("free + cached + owned", line.free + line.cached + line.owned, line.total)
        owned = Counter(tenant for _, tenant in others) + Counter(n.tenant for n in mine if n.pins)
        cached = Counter(node.tenant for node in mine if not node.pins)
        _equal("owned by tenant", Counter({t.tenant: t.owned for t in line.tenants if t.owned}), owned)
        _equal("cached by tenant", Counter({t.tenant: t.cached for t in line.tenants if t.cached}), cached)


def _equal(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise Broken(f"{what}: {actual} instead of {expected}")

"""The prefix index: a radix tree over full pages, one root for each tenant and adapter.

An edge is the exact tokens of one full page, so a hit is never a hash collision. The root is found by an
HMAC of both under a secret of this process: one tenant's tokens never lead into another's tree, nor those of
one adapter into the tree of another, whose KV is different.
After SGLang's RadixAttention (Zheng et al., 2024), with pages for edges and pins for its lock references.
"""

from __future__ import annotations

import hmac
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

DEVICE, HOST, DISK = range(3)
REUSES = 8  # how many uses of a page count
TURNOVER = 8  # a use makes a page as worthy as one that came a so-manieth of the arena later
COSTLY = 32_768  # tokens: at this depth a token costs about twice as much to compute as at the beginning


def eviction_priority(
    last_use: float, depth: int, uses: int, credit: float = 0.0, page_tokens: int = 1
) -> tuple[float, int]:
    """What goes first, lowest first: by recency, in pages that came since; a use more counts as ``credit``
    pages, times what it costs to compute the page again; among equals the deepest.

    The end of a prompt is shared by fewer requests than its beginning. Recency plus frequency times cost is
    the order of Greedy-Dual (Cao and Irani, 1997) with a clock of insertions in place of evictions.
    """
    reuse = min(max(uses - 1, 0), REUSES) * (1.0 + depth * page_tokens / COSTLY)
    return last_use + credit * reuse, -depth


class Node:
    """One full page in the index, in one tier: ``page`` is its page on the device, or its block elsewhere.

    ``pins`` counts the tasks and transfers whose path from the root passes here; a pinned node is not
    dropped, and one that is not pinned has no pinned descendant. While it is ``busy`` its page is on the way
    to another tier; it is ``lost`` when it could not be fetched. ``near`` counts its children by tier.
    """

    __slots__ = (
        "busy", "children", "depth", "key", "last_use", "lost", "near", "page", "parent",
        "pins", "tenant", "tier", "uses",
    )  # fmt: skip

    def __init__(self, parent: Node | None, key: bytes, page: int, tenant: str) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.tier = DEVICE
        self.tenant = tenant
        self.depth: int = parent.depth + 1 if parent else 0
        self.children: dict[bytes, Node] = {}
        self.near = [0, 0, 0]
        self.pins = 0
        self.uses = 0
        self.last_use = 0.0
        self.busy = False
        self.lost = False

    @property
    def droppable(self) -> bool:
        """Nobody needs it, and no other page of its tier hangs on it."""
        return self.parent is not None and not self.pins and not self.near[self.tier]


class Clock:
    """How many pages came into the index, or the indices, that go by it."""

    def __init__(self) -> None:
        self.now = 0.0


class RadixIndex:
    """Nodes for full pages; counts which of them nobody pins, and gives those up in eviction order.

    ``pages`` and ``page_tokens`` are the arena's: they weigh reuse against recency. Several indices may go by
    one ``clock``, if a page of each moves it by a ``tick`` in proportion to its size and ``pages`` counts
    ticks. ``loosened`` is told of each device page that nobody pins any more (1), or somebody does (-1).
    """

    def __init__(
        self,
        pages: int = 0,
        page_tokens: int = 1,
        clock: Clock | None = None,
        tick: float = 1.0,
        loosened: Callable[[Node, int], None] | None = None,
    ) -> None:
        self._time = clock or Clock()
        self._tick = tick
        self._loosened = loosened
        self._roots: dict[bytes, Node] = {}
        self._salt = _salter(secrets.token_bytes(32))
        self._credit = pages / TURNOVER
        self._page_tokens = page_tokens
        self._heaps: list[list[tuple[tuple[float, int], int, Node]]] = [[], [], []]
        self._pushed = 0
        self.loose = [
            Counter[str](),
            Counter[str](),
            Counter[str](),
        ]  # by tier: unpinned nodes of each tenant
        self.pinned = [Counter[str](), Counter[str](), Counter[str]()]
        self.unpinned = [0, 0, 0]

    @property
    def evictable(self) -> int:
        """How many nodes on the device nobody pins."""
        return self.unpinned[DEVICE]

    def root(self, tenant: str, adapter: str = "") -> Node:
        """The root of a tenant's tree for an adapter; no page belongs to it. Its key is its salt."""
        salt = self._salt(tenant, adapter)
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, salt, -1, tenant)
        return root

    def match(self, tenant: str, keys: Sequence[bytes], adapter: str = "") -> list[Node]:
        """The nodes of the longest indexed prefix of these pages' tokens that are at hand in some tier."""
        found: list[Node] = []
        node = self._roots.get(self._salt(tenant, adapter))
        for key in keys:
            node = node.children.get(key) if node is not None else None
            if node is None or node.busy or node.lost:
                break
            found.append(node)
        return found

    def insert(self, parent: Node, key: bytes, page: int) -> Node:
        """A new node on the device below a pinned one, or below a root; the caller pins it."""
        node = parent.children[key] = Node(parent, key, page, parent.tenant)
        parent.near[DEVICE] += 1
        self._time.now += self._tick
        self._count(node, 1)
        return node

    def pin(self, node: Node) -> None:
        """Count a task whose path has come to pass through this node; its ancestors are pinned already."""
        self._pin(node)
        node.uses += 1

    def pin_path(self, node: Node) -> None:
        """Keep a node and all above it, for as long as its page travels."""
        for step in lineage(node):
            self._pin(step)

    def unpin_path(self, node: Node, *, used: bool = True, stop: Node | None = None) -> None:
        """Take back the pins of a task from the end of its path up to the root, or to below ``stop``."""
        self._time.now += self._tick * used
        for step in lineage(node):
            if step is stop:
                break
            if used:
                step.last_use = self._time.now
            if step.pins > 1:
                step.pins -= 1
                continue
            self._count(step, -1)
            step.pins = 0
            self._count(step, 1)
            self._offer(step)

    def relocate(self, node: Node, tier: int, page: int) -> None:
        """A node's page is now in another tier."""
        parent = node.parent
        assert parent is not None
        self._count(node, -1)
        parent.near[node.tier] -= 1
        node.tier, node.page = tier, page
        parent.near[tier] += 1
        self._count(node, 1)
        self._offer(node)
        self._offer(parent)

    def evict(self, count: int, tier: int = DEVICE) -> list[Node]:
        """Drop ``count`` nodes of a tier, leaves first, with all that hangs on them in other tiers; the
        caller has made sure that so many are unpinned."""
        removed: list[Node] = []
        target = self.unpinned[tier] - count
        while self.unpinned[tier] > target:
            removed += self.drop(self._pop(tier))
        return removed

    def drop(self, node: Node) -> list[Node]:
        """Remove an unpinned node and all below it."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        parent.near[node.tier] -= 1
        removed, stack = [], [node]
        while stack:
            each = stack.pop()
            stack.extend(each.children.values())
            each.parent = None
            self._count(each, -1)
            removed.append(each)
        self._offer(parent)
        self._drop_if_empty(parent)
        return removed

    def coldest(self, tier: int, limit: int) -> list[Node]:
        """Up to ``limit`` unpinned nodes of a tier, in about the order in which they would be dropped: from
        each leaf upwards, as long as nothing else in the tier hangs on what comes next."""
        heap, found = self._heaps[tier], list[Node]()
        seen: dict[int, Node] = {}
        chosen: Counter[int] = Counter()  # by node: those of its children that were found
        while len(found) < limit and heap:
            priority, _, leaf = heappop(heap)
            if not self._is_current(tier, priority, leaf) or id(leaf) in seen:
                continue
            seen[id(leaf)] = leaf
            node: Node | None = leaf
            while node is not None and node.tier == tier and len(found) < limit:
                if node.parent is None or node.pins or node.near[tier] > chosen[id(node)]:
                    break
                found.append(node)
                node = node.parent
                chosen[id(node)] += 1
        for leaf in seen.values():
            self._offer(leaf)
        return found

    def nodes(self) -> Iterator[Node]:
        """Every node that has a page."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def priority(self, node: Node) -> tuple[float, int]:
        return eviction_priority(node.last_use, node.depth, node.uses, self._credit, self._page_tokens)

    def _pin(self, node: Node) -> None:
        if node.pins == 0:
            self._count(node, -1)
            node.pins = 1
            self._count(node, 1)
        else:
            node.pins += 1

    def _count(self, node: Node, change: int) -> None:
        if node.pins:
            self.pinned[node.tier][node.tenant] += change
        else:
            self.loose[node.tier][node.tenant] += change
            self.unpinned[node.tier] += change
            if self._loosened is not None and node.tier == DEVICE:
                self._loosened(node, change)

    def _offer(self, node: Node) -> None:
        """Make a node a candidate for eviction, if it is one."""
        if not node.droppable:
            return
        self._pushed += 1
        heap = self._heaps[node.tier]
        heappush(heap, (self.priority(node), self._pushed, node))
        if len(heap) > 2 * self.unpinned[node.tier] + 64:
            heap[:] = [entry for entry in heap if self._is_current(node.tier, entry[0], entry[2])]
            heapify(heap)

    def _pop(self, tier: int) -> Node:
        # Entries are not removed when a node is pinned or gets children; they are passed over here.
        while True:
            priority, _, node = heappop(self._heaps[tier])
            if self._is_current(tier, priority, node):
                return node

    def _is_current(self, tier: int, priority: tuple[float, int], node: Node) -> bool:
        return node.droppable and node.tier == tier and priority == self.priority(node)

    def _drop_if_empty(self, node: Node) -> None:
        if node.parent is None and not node.children:
            self._roots.pop(node.key, None)


def lineage(node: Node | None) -> Iterator[Node]:
    """A node and those above it, without the root."""
    while node is not None and node.parent is not None:
        yield node
        node = node.parent


def _salter(secret: bytes) -> Callable[[str, str], bytes]:
    def salt(tenant: str, adapter: str) -> bytes:
        return hmac.digest(secret, f"{len(tenant)}:{tenant}{adapter}".encode(), "sha256")

    return lru_cache(4096)(salt)

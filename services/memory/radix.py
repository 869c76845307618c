"""The prefix index: a radix tree over full pages, one root for each tenant.

An edge is the exact tokens of one full page, so a hit is never a hash collision. The root is found by an
HMAC of the tenant under a secret of this process: one tenant's tokens never lead into another's tree.
After SGLang's RadixAttention (Zheng et al., 2024), with pages for edges and pins for its lock references.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush


def eviction_priority(last_use: int, depth: int, uses: int) -> tuple[int, int]:
    """What goes first, lowest first: the longest unused; among equals the deepest.

    The end of a prompt is shared by fewer requests than its beginning. ``uses`` (how often tasks came to
    hold the page) is not weighed yet: on equal recency depth already tells the shared part from the rest.
    """
    return last_use, -depth


class Node:
    """One full page in the index.

    ``pins`` counts the tasks whose path from the root passes here; a pinned node is not evicted, and one
    that is not pinned has no pinned descendant.
    """

    __slots__ = ("children", "depth", "key", "last_use", "page", "parent", "pins", "tenant", "uses")

    def __init__(self, parent: Node | None, key: bytes, page: int, tenant: str) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.tenant = tenant
        self.depth: int = parent.depth + 1 if parent else 0
        self.children: dict[bytes, Node] = {}
        self.pins = 0
        self.uses = 0
        self.last_use = 0


class RadixIndex:
    """Nodes for full pages; counts which of them nobody pins, and gives those up in eviction order."""

    def __init__(self) -> None:
        self._roots: dict[bytes, Node] = {}
        self._salt = _salter(secrets.token_bytes(32))
        self._heap: list[tuple[tuple[int, int], int, Node]] = []
        self._pushed = 0
        self._clock = 0
        self.evictable = 0

    def root(self, tenant: str) -> Node:
        """The root of a tenant's tree; no page belongs to it."""
        salt = self._salt(tenant)
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, b"", -1, tenant)
        return root

    def match(self, tenant: str, keys: Sequence[bytes]) -> list[Node]:
        """The nodes of the longest indexed prefix of these pages' tokens."""
        found: list[Node] = []
        node = self._roots.get(self._salt(tenant))
        for key in keys:
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            found.append(node)
        return found

    def insert(self, parent: Node, key: bytes, page: int) -> Node:
        """A new node below a pinned one, or below a root; the caller pins it."""
        node = parent.children[key] = Node(parent, key, page, parent.tenant)
        self.evictable += 1
        return node

    def pin(self, node: Node) -> None:
        """Count a task whose path has come to pass through this node; its ancestors are pinned already."""
        if node.pins == 0:
            self.evictable -= 1
        node.pins += 1
        node.uses += 1

    def unpin_path(self, node: Node) -> None:
        """Take back the pins of a task from the end of its path up to the root."""
        self._clock += 1
        step: Node | None = node
        while step is not None and step.parent is not None:
            step.pins -= 1
            step.last_use = self._clock
            if step.pins == 0:
                self.evictable += 1
            step = step.parent
        self._offer(node)

    def evict(self, count: int) -> list[Node]:
        """Remove ``count`` nodes, leaves first; the caller has made sure that so many are evictable."""
        removed: list[Node] = []
        while len(removed) < count:
            _, _, node = self._pop()
            parent = node.parent
            if parent is None:
                continue
            del parent.children[node.key]
            node.parent = None
            self.evictable -= 1
            removed.append(node)
            self._offer(parent)
            self._drop_if_empty(parent)
        return removed

    def nodes(self) -> Iterator[Node]:
        """Every node that has a page."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _offer(self, node: Node) -> None:
        """Make a node a candidate for eviction, if it is an unpinned leaf."""
        if node.parent is None or node.pins or node.children:
            return
        self._pushed += 1
        heappush(self._heap, (_priority(node), self._pushed, node))
        if len(self._heap) > 2 * self.evictable + 64:
            self._heap = [entry for entry in self._heap if _is_current(entry[0], entry[2])]
            heapify(self._heap)

    def _pop(self) -> tuple[tuple[int, int], int, Node]:
        # Entries are not removed when a node is pinned or gets children; they are passed over here.
        while True:
            entry = heappop(self._heap)
            if _is_current(entry[0], entry[2]):
                return entry

    def _drop_if_empty(self, node: Node) -> None:
        if node.parent is None and not node.children:
            self._roots.pop(self._salt(node.tenant), None)


def _priority(node: Node) -> tuple[int, int]:
    return eviction_priority(node.last_use, node.depth, node.uses)


def _is_current(priority: tuple[int, int], node: Node) -> bool:
    evictable = node.parent is not None and node.pins == 0 and not node.children
    return evictable and priority == _priority(node)


def _salter(secret: bytes) -> Callable[[str], bytes]:
    return lru_cache(4096)(lambda tenant: hmac.digest(secret, tenant.encode(), "sha256"))

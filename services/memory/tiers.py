"""The tiers beside the device: host memory and disk. Swapping tasks, demoting cached pages, fetching hits.

A block is *free*, *owned* (by a node that somebody pins, by the tail of a swapped task, or by a transfer) or
*cached* (by a node that nobody pins). A page on its way is held at both ends by its transfer: it is neither
free nor usable there, whatever becomes of the task it is for.
"""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmos.ipc.errors import Busy, InvalidArgument, NoMemory, NotFound
from llmos.services.memory import messages
from llmos.services.memory.costs import Costs
from llmos.services.memory.messages import TenantUsage, TierUsage
from llmos.services.memory.pages import PagePool
from llmos.services.memory.radix import DEVICE, DISK, HOST, Node, lineage
from llmos.services.memory.transfers import TIERS, Item, Place, Transfer, batches

if TYPE_CHECKING:
    from llmos.services.memory.arena import Arena, Task

LOW, MOST = (
    16,
    4,
)  # a tier is low when fewer than a so-manieth of its pages are free, if demand is small or large
DEMANDS = 2  # tasks like the largest of late that find pages without waiting
FADING = 0.98  # of what a large demand counts, at each demand after it
BATCH_BYTES = 2 << 30  # what one demotion moves at most: fetches wait behind it


class Tiers:
    """The blocks of one arena beside the device, and the transfers between all of its tiers."""

    def __init__(self, arena: Arena) -> None:
        spec = arena.spec
        self._arena = arena
        self._index = arena.index
        self._ids = itertools.count(secrets.randbits(40))  # not those of a memory that went down
        self.pools = [arena.pool, PagePool(spec.host_pages), PagePool(spec.disk_pages)]
        self.costs = Costs()
        self.open: dict[int, Transfer] = {}
        self.away: dict[int, Task] = {}
        # By tier: blocks of tails and targets of transfers, which belong to no node.
        self._apart = [Counter[str](), Counter[str](), Counter[str]()]
        self._counted = Counter[str]()
        self._demand = 0.0
        self._batch = max(8, min(1024, BATCH_BYTES // max(1, spec.page_bytes)))

    # --- the operations ---

    def swap_out(self, id: int) -> Transfer:
        """Give up a task's device pages: what nobody else holds goes to host memory, and to disk where that
        is full. Raises NoMemory, with nothing changed, where both are."""
        task = self._arena.task(id)
        if task.away or task.transfer:
            raise InvalidArgument(f"task {id} is swapped out, or on its way")
        nodes = [node for node in lineage(task.path) if self._leaves_with(task, node)]
        tail = task.pages[task.indexed] if task.computed % self._arena.spec.page_tokens else -1
        hosted = self._make_room(len(nodes) + (tail >= 0))
        for node in nodes:
            if self._arena.pool.holders[node.page] == 0:
                # The task has a page of its own for this node, which goes instead of it.
                self._arena.hold(node.tenant, [node.page])
        items = self._items(nodes[:hosted], HOST) + self._items(nodes[hosted:], DISK)
        if tail >= 0:
            target = self._take(HOST if hosted > len(nodes) else DISK, task.tenant)
            items.append(Item(task.tenant, (DEVICE, tail), target, None, task))
        # The task's hold on what moves becomes the transfer's.
        moving = {item.source[1] for item in items}
        self._arena.release(task.tenant, [page for page in task.pages if page not in moving])
        task.away, task.pages = True, []
        self.away[id] = task
        return self._open(items, task, id)

    def swap_in(
        self, id: int, extra: int = 0, spare: int = 0, hurry: bool = True, borrow: bool = True
    ) -> tuple[list[int], int]:
        """Give a swapped task pages again, as ``Arena.reserve`` does. Raises NoMemory as that does, and Busy
        while something of it is on its way."""
        arena, task = self._arena, self._arena.task(id)
        if not task.away:
            raise InvalidArgument(f"task {id} is not swapped out")
        if extra < 0 or spare < 0:
            raise InvalidArgument(f"task {id}: {extra} more tokens, {spare} pages to spare")
        nodes = list(lineage(task.path))[::-1]
        if any(node.busy for node in nodes) or task.transfer:
            raise Busy(f"pages of task {id} are on their way; try again when that is settled")
        kept = next((i for i, node in enumerate(nodes) if node.lost), len(nodes))
        if kept < len(nodes):
            self._cut(task, kept)
            nodes = nodes[:kept]
        total = -(-(len(task.tokens) + extra) // arena.spec.page_tokens)
        owned = sum(arena.is_owned(node) for node in nodes) + (task.tail is not None)
        arena.check_quota(task.tenant, task.quota, total - owned)
        resident = sum(node.tier == DEVICE for node in nodes)
        arena.check_space(total - resident + spare, 0, hurry, borrow)
        task.away = False
        del self.away[id]
        self.bring_in(id, task, nodes, total, borrow)
        return list(task.pages), task.computed

    def bring_in(self, id: int, task: Task, nodes: list[Node], total: int, borrow: bool = True) -> None:
        """Hold ``total`` device pages for a task: those of ``nodes`` that are there, new ones for the rest;
        open a transfer for what has to be fetched into them. The caller has checked that there are enough."""
        arena = self._arena
        away = [node for node in nodes if node.tier != DEVICE]
        self.note_demand(total - len(nodes) + len(away))
        arena.hold(task.tenant, [node.page for node in nodes if node.tier == DEVICE])
        fresh = iter(arena.take(total - len(nodes) + len(away), borrow))
        task.pages += [node.page if node.tier == DEVICE else next(fresh) for node in nodes]
        items = [
            Item(node.tenant, (node.tier, node.page), (DEVICE, page), node)
            for node, page in zip(nodes, task.pages)
            if node.tier != DEVICE
        ]
        task.pages += fresh
        arena.hold(task.tenant, [page for node, page in zip(nodes, task.pages) if node.tier != DEVICE])
        arena.hold(task.tenant, task.pages[len(nodes) :])
        if task.tail is not None:
            items.append(Item(task.tenant, task.tail, (DEVICE, task.pages[len(nodes)]), None, task))
            task.tail = None
        for item in items:
            arena.hold(item.tenant, [item.target[1]])
        for node in away:
            node.busy = True
        if items:
            self._open(sorted(items, key=lambda item: item.source[0]), task, id)

    def demote(self) -> Transfer | None:
        """Move pages down from a tier that is low, as far as that is worth it: first from the device."""
        for tier in (DEVICE, HOST):
            if self._is_low(tier) and (items := self._demotion(tier)):
                return self._open(items)
        return None

    def settle(self, id: int, done: int) -> Task | None:
        """The first ``done`` batches of a transfer are copied; what is left is given up. Returns its task.

        A task that does not get all it had is freed: what was to be fetched for it is taken to be lost. One
        that is swapped out loses at most the tokens that do not fill a page.
        """
        transfer = self.open.pop(id, None)
        if transfer is None:
            raise NotFound(f"there is no transfer {id} in arena {self._arena.spec.arena!r}")
        task = transfer.task if transfer.task is not None and transfer.task.alive else None
        for index, items in enumerate(transfer.batches):
            for item in items:
                self._counted[item.tenant] -= item.counted
                if index < done:
                    self._arrived(item)
                else:
                    self._stayed(item)
                    if item.node is not None and item.target[0] == DEVICE and task is not None:
                        item.node.lost = True
        for end in transfer.pins:
            self._index.unpin_path(end, used=False)
        if task is None:
            return None
        task.transfer = None
        if done < len(transfer.batches) and not task.away:
            self._arena.free([transfer.owner])
            return None
        if task.away and task.tail is None:
            task.computed = task.indexed * self._arena.spec.page_tokens
        return task

    def abandon(self) -> None:
        """Nobody will settle what is open: its scheduler is gone."""
        for id in list(self.open):
            self.settle(id, 0)

    def discard(self, id: int, task: Task) -> None:
        """A task ends, wherever it is."""
        task.alive = False
        self.away.pop(id, None)
        if task.tail is not None:
            self._give_back(task.tail, task.tenant)
            task.tail = None

    def note_demand(self, pages: int) -> None:
        """A task asked for so many pages at once."""
        self._demand = max(pages, FADING * self._demand)

    def learn(self, costs: messages.Costs) -> None:
        """What moving and computing cost, as measured."""
        self.costs.compute = costs.token * self._arena.spec.page_tokens
        self.costs.fetch = {DEVICE: 0.0, HOST: costs.host, DISK: costs.disk}
        self.costs.transfer = costs.transfer

    # --- what others ask ---

    def worth_having(self, nodes: list[Node]) -> list[Node]:
        """The prefix hits that are to be used."""
        if all(node.tier == DEVICE for node in nodes):
            return nodes
        return nodes[: self.costs.worth_having(nodes)]

    def owned(self, tenant: str) -> int:
        """What a tenant owns beside the device, less what is counted twice while it is on its way."""
        return sum(self._owned(tier, tenant) for tier in (HOST, DISK)) - self._counted[tenant]

    @property
    def moving(self) -> int:
        """Pages on their way."""
        return sum(len(items) for transfer in self.open.values() for items in transfer.batches)

    @property
    def would_save(self) -> bool:
        """Whether the cached page that is dropped next had better be moved down a tier."""
        below = HOST if self.pools[HOST].total else DISK
        if not self.pools[below].total:
            return False
        costs = self.costs
        cold = self._index.coldest(DEVICE, 1)
        return any(costs.proven(node) and costs.worth_keeping(node, below) for node in cold)

    @property
    def low(self) -> bool:
        """Whether ``demote`` is likely to move something."""
        return any(self._is_low(t) and (self._index.unpinned[t] or self.away) for t in (DEVICE, HOST))

    def usage(self) -> list[TierUsage]:
        """The tiers there are beside the device."""
        return [self._usage(tier) for tier in (HOST, DISK) if self.pools[tier].total]

    # --- what they are made of ---

    def _leaves_with(self, task: Task, node: Node) -> bool:
        """Whether a node's page is on the device for the sake of this task alone."""
        if node.tier != DEVICE or node.busy:
            return False
        mine = task.pages[node.depth - 1] == node.page
        return self._arena.pool.holders[node.page] == mine

    def _items(self, nodes: Sequence[Node], tier: int) -> list[Item]:
        """Nodes to be moved down to a tier in which there is room; device pages are not held by this."""
        items = []
        for node in nodes:
            node.busy = True
            source, target = (node.tier, node.page), self._take(tier, node.tenant)
            items.append(Item(node.tenant, source, target, node))
        return items

    def _open(self, items: list[Item], task: Task | None = None, owner: int = 0) -> Transfer:
        transfer = Transfer(next(self._ids), batches(items), task, owner)
        for item in items:
            # A cached page that travels is charged to nobody; any other one once.
            item.counted = 1 if item.node is None or item.node.pins else 2
            self._counted[item.tenant] += item.counted
        for item in items:
            if item.node is not None:
                self._index.pin_path(item.node)
                transfer.pins.append(item.node)
        self.open[transfer.id] = transfer
        if task is not None:
            task.transfer = transfer
        return transfer

    def _take(self, tier: int, tenant: str) -> Place:
        self._apart[tier][tenant] += 1
        return tier, self.pools[tier].take(1)[0]

    def _give_back(self, place: Place, tenant: str) -> None:
        self._apart[place[0]][tenant] -= 1
        self.pools[place[0]].give_back(place[1])

    def _evict(self, tier: int, count: int) -> None:
        missing = count - self.pools[tier].free
        if missing > 0:
            for node in self._index.evict(missing, tier):
                self._arena.forget(node)

    def _room(self, tier: int) -> int:
        return self.pools[tier].free + self._index.unpinned[tier]

    def _make_room(self, needed: int) -> int:
        """Free so many blocks beside the device; how many of them in host memory. Raises NoMemory."""
        hosted = min(needed, self._room(HOST))
        if needed - hosted > self._room(DISK):
            raise NoMemory(
                f"{needed} blocks needed; {self._room(HOST)} in host memory and {self._room(DISK)} on disk"
                " are to be had",
                needed=needed,
            )
        self._evict(HOST, hosted)
        self._evict(DISK, needed - hosted)
        return hosted

    def _is_low(self, tier: int) -> bool:
        below = sum(pool.total for pool in self.pools[tier + 1 :])
        return bool(below) and self.pools[tier].at_hand < self._mark(tier)

    def _mark(self, tier: int) -> int:
        """So many pages of a tier are kept free: enough for what tasks have asked for of late."""
        total = self.pools[tier].total
        return max(total // LOW, min(total // MOST, int(DEMANDS * self._demand)))

    def _demotion(self, tier: int) -> list[Item]:
        """Items that bring a low tier over its mark, coldest first: what nobody needs, then what only
        swapped tasks do."""
        pool, below = self.pools[tier], tier + 1 if self.pools[tier + 1].total else DISK
        limit = min(self._batch, self._mark(tier) + pool.total // LOW + 1 - pool.at_hand, self._room(below))
        if limit <= 0:
            return []
        cold = [n for n in self._index.coldest(tier, limit) if self.costs.worth_keeping(n, below)]
        cold += self._stranded(tier, limit - len(cold))
        for node in cold:
            self._index.pin_path(node)  # lest making room for it should drop it
        room = self._room(below)
        self._evict(below, min(room, len(cold)))
        items = self._items(cold[:room], below)
        for node in cold:
            self._index.unpin_path(node, used=False)
        for item in items if tier == DEVICE else ():
            self._arena.hold(item.tenant, [item.source[1]])
        return items

    def _stranded(self, tier: int, limit: int) -> list[Node]:
        """Pages of a tier that only swapped tasks need: the newest task's first, which is served last."""
        found: dict[int, Node] = {}
        for task in reversed(self.away.values()):
            for node in lineage(task.path):
                if len(found) >= limit:
                    return list(found.values())
                if node.tier != tier or node.busy:
                    continue
                if tier != DEVICE or not self._arena.pool.holders[node.page]:
                    found.setdefault(id(node), node)
        return list(found.values())

    def _arrived(self, item: Item) -> None:
        """A page is copied: its source is free, and its target is the task's or the node's."""
        arena, (tier, number) = self._arena, item.target
        if item.node is not None:
            item.node.busy = item.node.lost = False
            self._index.relocate(item.node, tier, number)
            if item.source[0] == DEVICE:
                arena.indexed[item.source[1]] = 0
            else:
                self.pools[item.source[0]].give_back(item.source[1])
            if tier == DEVICE:
                arena.indexed[number] = 1
            else:
                self._apart[tier][item.tenant] -= 1
        elif tier == DEVICE:
            self._give_back(item.source, item.tenant)
        elif item.task is not None and item.task.alive:
            item.task.tail = item.target
        else:
            self._give_back(item.target, item.tenant)
        self._let_go(item)

    def _stayed(self, item: Item) -> None:
        """A page was not copied: its target is free, or the task's own. The tail of a task is lost."""
        if item.node is not None:
            item.node.busy = False
        elif item.source[0] != DEVICE:
            self._give_back(item.source, item.tenant)
        if item.target[0] != DEVICE:
            self._give_back(item.target, item.tenant)
        self._let_go(item)

    def _let_go(self, item: Item) -> None:
        for tier, number in (item.source, item.target):
            if tier == DEVICE:
                self._arena.release(item.tenant, [number])

    def _cut(self, task: Task, kept: int) -> None:
        """Only the first ``kept`` pages of a swapped task can still be had."""
        end = task.path
        for _ in range(task.indexed - kept):
            assert end is not None
            end = end.parent
        if task.path is not None and end is not None:
            self._index.unpin_path(task.path, used=False, stop=end)
        task.path, task.indexed = (end if kept else None), kept
        task.computed = kept * self._arena.spec.page_tokens
        if task.tail is not None:
            self._give_back(task.tail, task.tenant)
            task.tail = None

    def _owned(self, tier: int, tenant: str) -> int:
        return self._index.pinned[tier][tenant] + self._apart[tier][tenant]

    def _usage(self, tier: int) -> TierUsage:
        loose, pool = self._index.loose[tier], self.pools[tier]
        names = sorted({*loose, *self._index.pinned[tier], *self._apart[tier]})
        tenants = [TenantUsage(name, self._owned(tier, name), loose[name]) for name in names]
        return TierUsage(
            TIERS[tier],
            pool.total,
            pool.free,
            sum(t.cached for t in tenants),
            sum(t.owned for t in tenants),
            [t for t in tenants if t.owned or t.cached],
        )

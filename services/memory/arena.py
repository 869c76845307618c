"""The pages of one model on one driver: reserve, grow, commit and free, with quotas and a prefix cache.

A page is *free*, *owned* (held by at least one task or transfer) or *cached* (in the index, held by none).
Every operation checks all of its arguments before it changes anything. What concerns the tiers beside the
device is in ``tiers``.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

from llmos.ipc.errors import InvalidArgument, NoMemory, NotFound
from llmos.services.memory import messages
from llmos.services.memory.messages import ArenaUsage, TenantUsage
from llmos.services.memory.pages import PagePool
from llmos.services.memory.radix import DEVICE, Node, RadixIndex
from llmos.services.memory.slabs import SlabPages, SlabPool
from llmos.services.memory.tiers import Tiers
from llmos.services.memory.transfers import Transfer

MAX_PAGES = 1 << 24
MAX_TOKEN = (1 << 32) - 1
MAX_EXTRA = 1 << 24
_TOKEN_BYTES = array("I").itemsize


class Task:
    """What one task holds.

    ``tokens`` are all it has, ``computed`` how many of them have their KV in ``pages``. ``path`` is the node
    of its last full computed page, or the tenant's root; ``indexed`` is how many pages lead there. A page
    on the path may be another task's, where two computed the same: then this task's own stays private.

    A task that is ``away`` was swapped out: it has no pages, the nodes of its path are in any tier, and
    ``tail`` is the (tier, block) of the computed tokens that do not fill a page. ``transfer`` is open for it.
    """

    __slots__ = (
        "adapter", "alive", "away", "computed", "indexed", "pages", "path", "quota", "tail", "tenant",
        "tokens", "transfer",
    )  # fmt: skip

    def __init__(
        self, tenant: str, quota: int, tokens: array[int], pages: list[int], adapter: str = ""
    ) -> None:
        self.tenant = tenant
        self.adapter = adapter
        self.quota = quota
        self.tokens = tokens
        self.pages = pages
        self.computed = 0
        self.indexed = 0
        self.path: Node | None = None
        self.alive = True
        self.away = False
        self.tail: tuple[int, int] | None = None
        self.transfer: Transfer | None = None


class Arena:
    """One arena: pages of ``spec.page_tokens`` tokens, ``spec.pages`` of its own, or at most so many in the
    ``slabs`` of a pool, in which others are too. No I/O, no clock."""

    def __init__(self, spec: messages.Arena, slabs: SlabPool | None = None) -> None:
        if not 0 < spec.pages <= MAX_PAGES or spec.page_tokens <= 0 or spec.page_bytes < 0:
            raise InvalidArgument(
                f"arena {spec.arena!r} needs 1 to {MAX_PAGES} pages of at least one token,"
                f" not {spec.pages} pages of {spec.page_tokens} tokens and {spec.page_bytes} bytes"
            )
        if not (0 <= spec.host_pages <= MAX_PAGES and 0 <= spec.disk_pages <= MAX_PAGES):
            raise InvalidArgument(f"arena {spec.arena!r}: a tier has 0 to {MAX_PAGES} blocks")
        self.spec = spec
        self.pool: PagePool
        if slabs is None:
            self.pool = PagePool(spec.pages)
            self.index = RadixIndex(spec.pages, spec.page_tokens)
        else:
            self.pool = pages = SlabPages(slabs, spec.slab_pages, self.drop)
            self.index = pages.index(spec.page_tokens)
            slabs.join(spec.arena, pages)
        self.tasks: dict[int, Task] = {}
        self.indexed = bytearray(spec.pages)  # 1 where a node of the index has this page
        self.owned: defaultdict[str, int] = defaultdict(int)
        self.cached: defaultdict[str, int] = defaultdict(int)
        self.lookup_tokens = self.hit_tokens = self.evictions = 0
        self.tiers = Tiers(self)

    # --- the operations ---

    def reserve(
        self,
        id: int,
        tenant: str,
        tokens: Sequence[int],
        extra: int = 0,
        quota: int = 0,
        hurry: bool = True,
        adapter: str = "",
        borrow: bool = True,
        spare: int = 0,
        around: int = 0,
    ) -> tuple[list[int], int]:
        """Pages for ``tokens`` and ``extra`` more; (block table, number of tokens already cached in it, once
        the task's ``transfer`` is settled, if it has one).

        ``quota`` bounds the pages that the tenant owns in this arena, 0 for no bound. Raises NoMemory with
        ``free``, ``evictable`` and ``needed``, and ``demotable`` where pages worth keeping would be dropped
        and there is no ``hurry``; InvalidArgument for a task that holds pages already. Without ``borrow`` an
        arena of a pool gets no more slabs than its share. With ``spare`` it raises NoMemory unless so many
        pages more could be had, and beyond its share ``around`` besides.
        """
        if id in self.tasks:
            raise InvalidArgument(f"task {id} holds pages already: free them first")
        check_size(tokens, extra)
        text = pack(tokens)
        size = self.spec.page_tokens
        # The last token is always computed: its logits are what the task continues from.
        keys = self._keys(text, 0, (len(text) - 1) // size)
        hits = self.tiers.worth_having(self.index.match(tenant, keys, adapter))
        total = -(-(len(text) + extra) // size)
        self.check_quota(tenant, quota, total - len(hits) + sum(not self.is_owned(node) for node in hits))
        resident = [node for node in hits if node.tier == DEVICE]
        revived = sum(node.pins == 0 for node in resident)
        self.check_space(total - len(resident), revived, hurry, borrow)
        self.check_spare(total - len(resident), revived, spare, around)
        for node in hits:
            self.index.pin(node)
        task = self.tasks[id] = Task(tenant, quota, text, [], adapter)
        task.indexed = len(hits)
        task.computed = len(hits) * size
        task.path = hits[-1] if hits else None
        self.lookup_tokens += len(text)
        self.hit_tokens += task.computed
        self.tiers.costs.note_returned(hits)
        self.tiers.bring_in(id, task, hits, total, borrow)
        return list(task.pages), task.computed

    def grow(self, wants: Sequence[tuple[int, int]], borrow: bool = True) -> list[tuple[int, list[int]]]:
        """More pages for tasks, in this order: for each all it wants, or none where that would not fit."""
        for id, count in wants:
            if self.task(id).away:
                raise InvalidArgument(f"task {id} is swapped out")
            if not 0 <= count <= self.spec.pages:
                raise InvalidArgument(f"task {id} wants {count} pages of {self.spec.pages}")
        return [(id, self._grow(self.tasks[id], count, borrow)) for id, count in wants]

    def commit(self, tasks: Sequence[tuple[int, list[int], int]]) -> None:
        """Note tokens appended and KV computed: (task, new tokens, number of tokens computed in all).

        Pages that are full of computed tokens become shareable at once. A task that holds nothing is passed
        over: it was freed while its last step ran. Raises InvalidArgument, for all of them, where more is
        computed than there are tokens or pages for.
        """
        size = self.spec.page_tokens
        for id, new, computed in tasks:
            task = self.tasks.get(id)
            if task is None:
                continue
            if task.away:
                raise InvalidArgument(f"task {id} is swapped out")
            if new and not 0 <= min(new) <= max(new) <= MAX_TOKEN:
                raise InvalidArgument(f"task {id}: a token is an integer from 0 to {MAX_TOKEN}")
            limit = min(len(task.tokens) + len(new), len(task.pages) * size)
            if not task.computed <= computed <= limit:
                raise InvalidArgument(f"task {id}: computed {computed} is not in {task.computed}..{limit}")
        if len({entry[0] for entry in tasks}) < len(tasks):
            raise InvalidArgument("a task is named twice in one commit")
        for id, new, computed in tasks:
            task = self.tasks.get(id)
            if task is None:
                continue
            task.tokens.extend(new)
            task.computed = computed
            if computed // size > task.indexed:
                self.index_pages(task)

    def free(self, ids: Iterable[int]) -> None:
        """Take back what these tasks hold; an id that holds nothing is passed over. Cached pages stay."""
        for id in ids:
            task = self.tasks.pop(id, None)
            if task is None:
                continue
            if task.path is not None:
                self.index.unpin_path(task.path)
            self.tiers.discard(id, task)
            self.release(task.tenant, task.pages)

    def usage(self) -> ArenaUsage:
        """Pages by use; ``free + cached + owned == total``."""
        names = sorted({*self.owned, *self.cached})
        tenants = [TenantUsage(n, self.owned[n], self.cached[n]) for n in names]
        return ArenaUsage(
            arena=self.spec.arena,
            total=self.pool.total,
            free=self.pool.free,
            cached=sum(t.cached for t in tenants),
            owned=sum(t.owned for t in tenants),
            page_tokens=self.spec.page_tokens,
            page_bytes=self.spec.page_bytes,
            lookup_tokens=self.lookup_tokens,
            hit_tokens=self.hit_tokens,
            evictions=self.evictions,
            tenants=[t for t in tenants if t.owned or t.cached],
            moving=self.tiers.moving,
            tiers=self.tiers.usage(),
            pool=self.spec.pool,
            slabs=self.pool.total // self.spec.slab_pages if self.spec.pool else 0,
        )

    # --- what they are made of ---

    def task(self, id: int) -> Task:
        task = self.tasks.get(id)
        if task is None:
            raise NotFound(f"task {id} holds no pages in arena {self.spec.arena!r}")
        return task

    def _keys(self, tokens: array[int], start: int, stop: int) -> list[bytes]:
        """The index keys of full pages ``start`` to ``stop``: their tokens as bytes."""
        size = self.spec.page_tokens
        raw, width = tokens[start * size : stop * size].tobytes(), size * _TOKEN_BYTES
        return [raw[at : at + width] for at in range(0, len(raw), width)]

    def is_owned(self, node: Node) -> bool:
        """Whether a node's page counts for its tenant's quota already."""
        return self.pool.holders[node.page] > 0 if node.tier == DEVICE else node.pins > 0

    def used(self, tenant: str) -> int:
        """The pages that a tenant owns in all tiers; one on its way counts once."""
        return self.owned.get(tenant, 0) + self.tiers.owned(tenant)

    def check_quota(self, tenant: str, quota: int, count: int) -> None:
        """Raise NoMemory where the tenant may not own so many pages more."""
        if quota and count > 0 and self.used(tenant) + count > quota:
            raise NoMemory(
                f"tenant {tenant!r} owns {self.used(tenant)} of {quota} pages and needs {count} more",
                free=self.pool.free,
                evictable=self.index.evictable,
                needed=count,
                quota=quota,
            )

    def check_space(self, needed: int, kept: int = 0, hurry: bool = True, borrow: bool = True) -> None:
        """Raise NoMemory where so many device pages are not to be had, or not without a loss; ``kept`` pages
        of the cache are not to be evicted."""
        if needed <= self.pool.free:
            return
        evictable = self.index.evictable - kept + self.pool.elsewhere(borrow)
        enough = needed <= self.pool.free + evictable
        if not hurry and enough and self.pool.at_hand < needed and self.tiers.would_save:
            self.tiers.note_demand(needed)
            raise NoMemory(
                f"{needed} pages needed; {self.pool.free} are free, and others are worth to be moved first",
                free=self.pool.free,
                evictable=evictable,
                needed=needed,
                demotable=True,
            )
        if not enough:
            owed, lenders = self.pool.debts()
            raise NoMemory(
                f"{needed} pages needed; {self.pool.free} are free and {evictable} can be evicted",
                free=self.pool.free,
                evictable=evictable,
                needed=needed,
                **({"owed": owed, "lenders": lenders, "kept": kept} if lenders else {}),
            )

    def check_spare(self, needed: int, kept: int, spare: int, around: int) -> None:
        """Raise NoMemory where so many pages could be had, but not ``spare`` more."""
        here = self.pool.free + self.index.evictable - kept
        within = needed + spare <= here + self.pool.claimable
        if not within and needed + spare + around > here + self.pool.elsewhere():
            raise NoMemory(
                f"{needed} pages needed and {spare} to spare, {around} for others; {here} are to be had here",
                needed=needed,
                spare=spare,
            )

    def _grow(self, task: Task, count: int, borrow: bool) -> list[int]:
        within = not task.quota or self.used(task.tenant) + count <= task.quota
        if not within or not self._can_take(count, borrow):
            return []
        pages = self.take(count, borrow)
        self.hold(task.tenant, pages)
        task.pages += pages
        return pages

    def _can_take(self, count: int, borrow: bool) -> bool:
        here = self.pool.free + self.index.evictable
        return count <= here or count <= here + self.pool.elsewhere(borrow)

    def take(self, count: int, borrow: bool = True) -> list[int]:
        """Free device pages, evicting what is missing; the caller has checked that there are so many."""
        missing = count - self.pool.free
        if missing > 0:
            missing -= self.pool.obtain(missing, self.index, borrow)
        if missing > 0:
            for node in self.index.evict(missing):
                self.forget(node)
        return self.pool.take(count)

    def drop(self, node: Node) -> None:
        """Give up a cached page, and all that hangs on it."""
        for each in self.index.drop(node):
            self.forget(each)

    def forget(self, node: Node) -> None:
        """A node was dropped from the index: its page is free."""
        if node.tier == DEVICE:
            self.indexed[node.page] = 0
            self.cached[node.tenant] -= 1
            self.pool.give_back(node.page)
            self.evictions += 1
        else:
            self.tiers.pools[node.tier].give_back(node.page)
            self.tiers.costs.note_dropped(node)

    def hold(self, tenant: str, pages: Sequence[int]) -> None:
        """Count one holder more for each of these device pages."""
        holders, indexed = self.pool.holders, self.indexed
        for page in pages:
            if holders[page] == 0:
                self.owned[tenant] += 1
                self.cached[tenant] -= indexed[page]
            holders[page] += 1

    def release(self, tenant: str, pages: Sequence[int]) -> None:
        """Count one holder less for each of these device pages; those in the index stay as cache."""
        holders, indexed = self.pool.holders, self.indexed
        for page in pages:
            holders[page] -= 1
            if holders[page] == 0:
                self.owned[tenant] -= 1
                if indexed[page]:
                    self.cached[tenant] += 1
                else:
                    self.pool.give_back(page)

    def index_pages(self, task: Task) -> None:
        """Lead the task's path on over its newly full pages; where a node exists it keeps its page."""
        full = task.computed // self.spec.page_tokens
        node = task.path or self.index.root(task.tenant, task.adapter)
        for key, page in zip(self._keys(task.tokens, task.indexed, full), task.pages[task.indexed : full]):
            child = node.children.get(key)
            if child is None:
                child = self.index.insert(node, key, page)
                self.indexed[page] = 1
            elif child.tier != DEVICE and not child.busy:
                # Computed again instead of fetched: the block is not needed any more.
                self.tiers.pools[child.tier].give_back(child.page)
                self.index.relocate(child, DEVICE, page)
                child.lost = False
                self.indexed[page] = 1
            self.index.pin(child)
            node = child
        task.indexed, task.path = full, node


def check_size(tokens: Sequence[int], extra: int) -> None:
    """Raise InvalidArgument where a task of this size makes no sense."""
    if not tokens or not 0 <= extra <= MAX_EXTRA:
        raise InvalidArgument(f"a task needs a token at least, and extra from 0 to {MAX_EXTRA}")


def pack(tokens: Sequence[int]) -> array[int]:
    """Tokens in 32 bits each; InvalidArgument where one is none."""
    try:
        return array("I", tokens)
    except (OverflowError, TypeError):
        raise InvalidArgument(f"a token is an integer from 0 to {MAX_TOKEN}") from None

"""The messages on the link to memory.

An *arena* is the KV pages of one model on one driver. A *task* owns pages under the id that the scheduler
gave it. The tenant whose prefix cache is used is the one in the grant of the call, never a field.
"""

from __future__ import annotations

import msgspec

from llmos.drivers.sdk.messages import Tier


class Arena(msgspec.Struct, frozen=True, kw_only=True):
    """Declare an arena, empty; an earlier one of that name is forgotten, with all that was in it.

    ``host_pages`` and ``disk_pages`` are the blocks of its other tiers. With a ``pool`` its pages are in as
    many of the pool's ``slabs`` as it holds, ``slab_pages`` in each; ``pages`` is as if it held all. Arenas
    with one name of a pool share it.
    """

    arena: str
    pages: int
    page_tokens: int
    page_bytes: int
    host_pages: int = 0
    disk_pages: int = 0
    pool: str = ""
    slabs: int = 0
    slab_pages: int = 0
    slab_bytes: int = 0


class DropArena(msgspec.Struct, frozen=True):
    """The arena is gone, because its driver or its model is."""

    arena: str


class Reserve(msgspec.Struct, frozen=True):
    """Pages for a task's first ``len(tokens)`` tokens and ``extra`` more: cached ones for the longest prefix
    of ``tokens`` that this tenant may share, new ones for the rest. At least one token is left to compute.
    In a ``hurry`` cached pages are dropped for it that had better be demoted first. Tasks share pages only
    with those of the same ``adapter``, on which their KV depends. Unless it may ``borrow`` an arena of a pool
    gets no more than its share. With ``spare`` only if so many pages more could be had, and where
    that is beyond its share ``around`` besides, which its neighbours may need."""

    arena: str
    task: int
    tokens: list[int]
    extra: int = 0
    hurry: bool = True
    adapter: str = ""
    borrow: bool = True
    spare: int = 0
    around: int = 0


class Batch(msgspec.Struct, frozen=True):
    """Pages of one tenant to copy from one tier to another: (number at the source, at the target) each."""

    source: Tier
    target: Tier
    pages: list[tuple[int, int]]
    tenant: str


class Transfer(msgspec.Struct, frozen=True):
    """Batches for the driver to move, one after the other; then ``Settle`` says how many were. Until then
    the pages at both ends are neither free nor to be had by anyone else."""

    id: int
    batches: list[Batch]


class Reserved(msgspec.Struct, frozen=True):
    """The task's block table; the KV of the first ``cached`` tokens is in it, once ``transfer`` is settled.
    ``low``: few pages are free, and ``Demote`` would help."""

    pages: list[int]
    cached: int
    transfer: Transfer | None = None
    low: bool = False


class SwapOut(msgspec.Struct, frozen=True):
    """A task that does not run gives its device pages up and keeps their content in the other tiers. What
    other tasks hold as well stays where it is."""

    arena: str
    task: int


class SwapIn(msgspec.Struct, frozen=True):
    """Device pages for all tokens of a swapped task and ``extra`` more; the answer is ``Reserved``. With
    ``spare`` only if so many pages stay free or evictable."""

    arena: str
    task: int
    extra: int = 0
    spare: int = 0
    hurry: bool = True
    borrow: bool = True


class Demote(msgspec.Struct, frozen=True):
    """Make room on the device, or in host memory, by moving cached pages a tier down instead of dropping
    them; a transfer without batches says that nothing is worth it."""

    arena: str


class Settle(msgspec.Struct, frozen=True):
    """The first ``done`` batches of a transfer were copied, the others were not and will not be."""

    arena: str
    transfer: int
    done: int


class Settled(msgspec.Struct, frozen=True):
    """``cached`` tokens of the transfer's task are computed now, in its pages or, if it is swapped, in other
    tiers; ``low`` as in ``Reserved``."""

    cached: int
    low: bool = False


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What things cost in an arena, in microseconds: to compute a token, to bring a page to the device from
    host memory or from disk, and for a transfer however small. ``token`` 0: not known, moving is better."""

    arena: str
    token: float
    host: float
    disk: float
    transfer: float


class Grow(msgspec.Struct, frozen=True):
    """More pages for running tasks: (task, number of pages) each."""

    arena: str
    wants: list[tuple[int, int]]
    borrow: bool = True


class Grown(msgspec.Struct, frozen=True):
    """(task, new pages) for each that was asked for; an empty list where none was left. ``low`` as in
    ``Reserved``. Where one got none in a shared pool, the arena may still have ``owed`` slabs of its share,
    and ``lenders`` are the arenas that use more than theirs, with how many more."""

    gets: list[tuple[int, list[int]]]
    low: bool = False
    owed: int = 0
    lenders: dict[str, int] = {}


class Commit(msgspec.Struct, frozen=True):
    """The KV of these tokens is in the tasks' pages now: (task, tokens appended since the last commit,
    number of tokens whose KV is computed). Full pages become shareable at once."""

    arena: str
    tasks: list[tuple[int, list[int], int]]


class Free(msgspec.Struct, frozen=True):
    """Tasks give their pages back; committed full pages stay as prefix cache until the space is needed."""

    arena: str
    tasks: list[int]


class Holding(msgspec.Struct, frozen=True):
    """What one task holds, told by the scheduler when memory was started anew. ``quota`` bounds the pages
    of its tenant, 0 for no bound."""

    task: int
    tenant: str
    pages: list[int]
    tokens: list[int]
    computed: int
    quota: int = 0
    adapter: str = ""


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """An arena and all that is held in it; what is not named here is free."""

    arena: Arena
    tasks: list[Holding]


class TenantUsage(msgspec.Struct, frozen=True):
    tenant: str
    owned: int
    cached: int


class TierUsage(msgspec.Struct, frozen=True):
    """Blocks of one tier beside the device by use; ``free + cached + owned == total``. Owned are those of
    swapped tasks, and what is on its way."""

    tier: Tier
    total: int
    free: int
    cached: int
    owned: int
    tenants: list[TenantUsage]


class ArenaUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Pages by use; ``free + cached + owned == total``. Hits and lookups count tokens. ``moving`` pages are
    on their way between tiers, and owned at both ends. In a ``pool`` these are the pages of the ``slabs``
    that it holds."""

    arena: str
    total: int
    free: int
    cached: int
    owned: int
    page_tokens: int
    page_bytes: int
    lookup_tokens: int
    hit_tokens: int
    evictions: int
    tenants: list[TenantUsage]
    moving: int = 0
    tiers: list[TierUsage] = []
    pool: str = ""
    slabs: int = 0


class PoolUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The slabs of a pool: ``slabs`` of ``slab_bytes`` each, of which nobody holds ``free``; each of its
    ``arenas`` can have ``share`` of them whenever it needs them."""

    pool: str
    slabs: int
    free: int
    slab_bytes: int
    share: int
    arenas: list[str]


class Usage(msgspec.Struct, frozen=True):
    arenas: list[ArenaUsage]
    pools: list[PoolUsage] = []

"""The messages on the link to memory.

An *arena* is the KV pages of one model on one driver. A *task* owns pages under the id that the scheduler
gave it. The tenant whose prefix cache is used is the one in the grant of the call, never a field.
"""

from __future__ import annotations

import msgspec


class Arena(msgspec.Struct, frozen=True, kw_only=True):
    """Declare an arena, empty; an earlier one of that name is forgotten, with all that was in it."""

    arena: str
    pages: int
    page_tokens: int
    page_bytes: int


class DropArena(msgspec.Struct, frozen=True):
    """The arena is gone, because its driver or its model is."""

    arena: str


class Reserve(msgspec.Struct, frozen=True):
    """Pages for a task's first ``len(tokens)`` tokens and ``extra`` more: cached ones for the longest prefix
    of ``tokens`` that this tenant may share, new ones for the rest. At least one token is left to compute."""

    arena: str
    task: int
    tokens: list[int]
    extra: int = 0


class Reserved(msgspec.Struct, frozen=True):
    """The task's block table; the KV of the first ``cached`` tokens is already in it."""

    pages: list[int]
    cached: int


class Grow(msgspec.Struct, frozen=True):
    """More pages for running tasks: (task, number of pages) each."""

    arena: str
    wants: list[tuple[int, int]]


class Grown(msgspec.Struct, frozen=True):
    """(task, new pages) for each that was asked for; an empty list where none was left."""

    gets: list[tuple[int, list[int]]]


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


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """An arena and all that is held in it; what is not named here is free."""

    arena: Arena
    tasks: list[Holding]


class TenantUsage(msgspec.Struct, frozen=True):
    tenant: str
    owned: int
    cached: int


class ArenaUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Pages by use; ``free + cached + owned == total``. Hits and lookups count tokens."""

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


class Usage(msgspec.Struct, frozen=True):
    arenas: list[ArenaUsage]

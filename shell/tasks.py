"""``llmos kill``, ``nice``, ``stop``, ``cont``: what is done to tasks; ``free``: who has the memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmos.services.memory.messages import ArenaUsage, PoolUsage, TierUsage, Usage
from llmos.services.scheduler.messages import Cont, Kill, Nice, Pause
from llmos.shell import saving, session
from llmos.shell.output import size, table

ARENAS = ("ARENA", "PAGES", "OWNED", "CACHED", "FREE", "SIZE", "HITS")
POOLS = ("POOL", "ARENA", "SLABS", "SHARE", "SIZE", "OWNED", "CACHED", "FREE")
TIERS = ("ARENA", "TIER", "SIZE", "OWNED", "CACHED", "FREE", "MOVING")
TENANTS = ("ARENA", "TIER", "TENANT", "OWNED", "CACHED")


def kill(options: argparse.Namespace) -> int:
    """End tasks; their callers get ECANCELED."""
    return _each("scheduler.kill", [Kill(task) for task in options.task])


def nice(options: argparse.Namespace) -> int:
    """Move tasks to another band."""
    return _each("scheduler.nice", [Nice(task, options.band) for task in options.task])


def stop(options: argparse.Namespace) -> int:
    """Take tasks off the device; with ``--save`` one of them into a file."""
    if options.save is not None:
        return saving.save(options.task, options.save)
    return _each("scheduler.pause", [Pause(task) for task in options.task])


def cont(options: argparse.Namespace) -> int:
    """Let stopped tasks go on, or one from a file."""
    if not all(task.isdecimal() for task in options.task):
        return saving.go_on([Path(name) for name in options.task], rest=options.rest)
    return _each("scheduler.cont", [Cont(int(task)) for task in options.task])


def free(options: argparse.Namespace) -> int:
    """Print the pages of every arena in every tier, and whose they are."""
    with session.connect() as client:
        usage = client.call("memory.usage", None, Usage)
    arenas = usage.arenas
    if not arenas:
        print("no model has memory")
        return 0
    print(arena_table(arenas))
    if usage.pools:
        print()
        print(pool_table(usage.pools, arenas))
    if any(arena.tiers for arena in arenas):
        print()
        print(tier_table(arenas))
    if any(arena.tenants for arena in arenas):
        print()
        print(tenant_table(arenas))
    return 0


def arena_table(arenas: list[ArenaUsage]) -> str:
    """Every arena: its pages by use, its size, and which share of prompt tokens was found in it."""
    rows = [
        (
            arena.arena,
            arena.total,
            arena.owned,
            arena.cached,
            arena.free,
            size(arena.total * arena.page_bytes),
            f"{arena.hit_tokens / arena.lookup_tokens:.0%}" if arena.lookup_tokens else "-",
        )
        for arena in arenas
    ]
    return table(ARENAS, rows, right=ARENAS[1:])


def pool_table(pools: list[PoolUsage], arenas: list[ArenaUsage]) -> str:
    """Every pool: which arena has how many of its slabs, for what; and what nobody has. In bytes."""
    rows = []
    for pool in pools:
        for arena in (arena for arena in arenas if arena.pool == pool.pool):
            counts = (arena.owned, arena.cached, arena.free)
            held = size(arena.slabs * pool.slab_bytes)
            used = (size(count * arena.page_bytes) for count in counts)
            rows.append((pool.pool, arena.arena, arena.slabs, pool.share, held, *used))
        rows.append((pool.pool, "-", pool.free, "-", size(pool.free * pool.slab_bytes), "-", "-", "-"))
    return table(POOLS, rows, right=POOLS[2:])


def tier_table(arenas: list[ArenaUsage]) -> str:
    """The tiers beside the devices, in bytes by use, and what is on its way between tiers."""
    rows = [
        (arena.arena, line.tier, *(size(n * arena.page_bytes) for n in (*_counts(line), arena.moving)))
        for arena in arenas
        for line in arena.tiers
    ]
    return table(TIERS, rows, right=TIERS[2:])


def _counts(line: TierUsage) -> tuple[int, int, int, int]:
    return line.total, line.owned, line.cached, line.free


def tenant_table(arenas: list[ArenaUsage]) -> str:
    """Whose pages they are in each tier, in bytes."""
    rows = [
        (arena.arena, tier, line.tenant, *(size(n * arena.page_bytes) for n in (line.owned, line.cached)))
        for arena in arenas
        for tier, tenants in [("device", arena.tenants), *((t.tier, t.tenants) for t in arena.tiers)]
        for line in tenants
    ]
    return table(TENANTS, rows, right=TENANTS[3:])


def _each(method: str, bodies: list[object]) -> int:
    with session.connect() as client:
        for body in bodies:
            client.call(method, body)
    return 0

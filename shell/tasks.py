"""``llmos kill``, ``nice``, ``stop``, ``cont``: what is done to tasks; ``free``: who has the memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmos.services.memory.messages import ArenaUsage, Usage
from llmos.services.scheduler.messages import Cont, Kill, Nice, Pause
from llmos.shell import saving, session
from llmos.shell.output import size, table

ARENAS = ("ARENA", "PAGES", "OWNED", "CACHED", "FREE", "SIZE", "HITS")
TENANTS = ("ARENA", "TENANT", "OWNED", "CACHED")


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
    """Print the pages of every arena, and whose they are."""
    with session.connect() as client:
        arenas = client.call("memory.usage", None, Usage).arenas
    if not arenas:
        print("no model has memory")
        return 0
    print(arena_table(arenas))
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


def tenant_table(arenas: list[ArenaUsage]) -> str:
    """Whose pages they are, in bytes."""
    rows = [
        (arena.arena, line.tenant, size(line.owned * arena.page_bytes), size(line.cached * arena.page_bytes))
        for arena in arenas
        for line in arena.tenants
    ]
    return table(TENANTS, rows, right=TENANTS[2:])


def _each(method: str, bodies: list[object]) -> int:
    with session.connect() as client:
        for body in bodies:
            client.call(method, body)
    return 0

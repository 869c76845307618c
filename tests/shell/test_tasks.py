"""What ``free`` shows, and that the verbs for tasks reach the scheduler."""

from __future__ import annotations

from types import TracebackType

import msgspec
import pytest

from llmos.services.memory.messages import ArenaUsage, PoolUsage, TenantUsage, TierUsage
from llmos.services.scheduler.messages import Cont, Kill, Nice, Pause
from llmos.shell import session
from llmos.shell.main import main
from llmos.shell.output import size
from llmos.shell.tasks import arena_table, pool_table, tenant_table, tier_table

ARENA = ArenaUsage(
    arena="jax0/m",
    total=100,
    free=60,
    cached=10,
    owned=30,
    page_tokens=16,
    page_bytes=1 << 20,
    lookup_tokens=400,
    hit_tokens=100,
    evictions=0,
    tenants=[TenantUsage("a", 30, 10)],
)


def test_an_arena_shows_its_pages_by_use_and_its_hits() -> None:
    assert arena_table([ARENA]).split("\n")[1].split() == ["jax0/m", "100", "30", "10", "60", "100MiB", "25%"]


def test_a_tenant_shows_its_bytes() -> None:
    assert tenant_table([ARENA]).split("\n")[1].split() == ["jax0/m", "device", "a", "30MiB", "10MiB"]


def test_a_pool_shows_who_has_its_slabs_and_what_nobody_has() -> None:
    arena = msgspec.structs.replace(ARENA, pool="jax0/p", slabs=5)
    pool = PoolUsage(pool="jax0/p", slabs=8, free=3, slab_bytes=21 << 20, share=4, arenas=["jax0/m"])
    lines = [line.split() for line in pool_table([pool], [arena]).split("\n")]
    assert lines[1] == ["jax0/p", "jax0/m", "5", "4", "105MiB", "30MiB", "10MiB", "60MiB"]
    assert lines[2] == ["jax0/p", "-", "3", "-", "63MiB", "-", "-", "-"]


def test_the_other_tiers_show_their_bytes_by_use_and_by_tenant() -> None:
    host = TierUsage("host", 50, 20, 8, 22, [TenantUsage("a", 22, 8)])
    arena = msgspec.structs.replace(ARENA, tiers=[host], moving=4)
    line = tier_table([arena]).split("\n")[1].split()
    assert line == ["jax0/m", "host", "50MiB", "22MiB", "8MiB", "20MiB", "4MiB"]
    assert tenant_table([arena]).split("\n")[2].split() == ["jax0/m", "host", "a", "22MiB", "8MiB"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (1 << 40, "1TiB"), (1 << 51, "2048TiB")]
)
def test_sizes_are_in_binary_units(count: int, text: str) -> None:
    assert size(count) == text


class Recorder:
    """A client that only notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def call(self, method: str, body: object) -> None:
        self.calls.append((method, body))


def test_the_verbs_call_the_scheduler_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Recorder()
    monkeypatch.setattr(session, "connect", lambda: client)
    for line in ("kill 1 2", "nice batch 3", "stop 4", "cont 4"):
        assert main(line.split()) == 0
    assert client.calls == [
        ("scheduler.kill", Kill(1)),
        ("scheduler.kill", Kill(2)),
        ("scheduler.nice", Nice(3, "batch")),
        ("scheduler.pause", Pause(4)),
        ("scheduler.cont", Cont(4)),
    ]

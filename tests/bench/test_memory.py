"""What memory's operations cost; each must stay well under a millisecond."""

from __future__ import annotations

import itertools

from pytest_benchmark.fixture import BenchmarkFixture

from llmos.ipc import codec
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena
from llmos.services.memory.messages import Commit, Holding, Restore
from llmos.services.memory.restoring import restore

PROMPT = list(range(2000))


def arena(pages: int = 16384) -> Arena:
    return Arena(messages.Arena(arena="a", pages=pages, page_tokens=16, page_bytes=1))


def test_reserve_2000_tokens_of_nothing_cached(benchmark: BenchmarkFixture) -> None:
    one, ids = arena(), itertools.count()

    def turn() -> None:
        id = next(ids)
        one.reserve(id, "t", PROMPT)
        one.free([id])

    benchmark(turn)


def test_reserve_2000_tokens_all_cached(benchmark: BenchmarkFixture) -> None:
    one, ids = arena(), itertools.count(1)
    one.reserve(0, "t", PROMPT)
    one.commit([(0, [], 2000)])

    def turn() -> None:
        id = next(ids)
        one.reserve(id, "t", PROMPT)
        one.free([id])

    benchmark(turn)


def test_reserve_and_commit_2000_tokens_by_eviction(benchmark: BenchmarkFixture) -> None:
    one, ids = arena(1024), itertools.count()

    def turn() -> None:
        id = next(ids)
        one.reserve(id, "t", [id, *PROMPT[1:]])
        one.commit([(id, [], 2000)])
        one.free([id])

    benchmark(turn)


def test_commit_one_token_each_of_256_tasks(benchmark: BenchmarkFixture) -> None:
    one = arena(32768)
    for id in range(256):
        one.reserve(id, "t", [id] * 100, extra=1900)
    counts = itertools.count(101)

    def turn() -> None:
        count = next(counts)
        frame = codec.encode(Commit("a", [(id, [7], count) for id in range(256)]))
        one.commit(codec.decode(frame, Commit).tasks)

    benchmark.pedantic(turn, rounds=1800)


def test_grow_256_tasks_by_a_page(benchmark: BenchmarkFixture) -> None:
    def setup() -> tuple[tuple[Arena], dict[str, object]]:
        one = arena(32768)
        for id in range(256):
            one.reserve(id, "t", [id] * 1000)
        one.free(range(0, 256, 2))
        for id in range(0, 256, 2):
            one.reserve(id, "t", [id] * 1000)
        return (one,), {}

    benchmark.pedantic(lambda one: one.grow([(id, 1) for id in range(256)]), setup=setup, rounds=20)


def test_take_125_pages_of_a_fragmented_pool(benchmark: BenchmarkFixture) -> None:
    one, ids = arena(100_000), itertools.count(100_000)
    for id in range(99_000):
        one.reserve(id, "t", [id])
    one.free(range(0, 99_000, 2))
    one.pool.take(1000)

    def turn() -> None:
        id = next(ids)
        one.reserve(id, "t", PROMPT)
        one.free([id])

    benchmark(turn)


def test_restore_256_tasks_of_500_tokens(benchmark: BenchmarkFixture) -> None:
    one = arena()
    held = [Holding(i, "t", list(range(i * 32, i * 32 + 32)), [i] * 500, 499) for i in range(256)]
    benchmark(lambda: restore(Restore(arena=one.spec, tasks=held)))

"""The arena as a specification: what reserve, grow, commit, free and restore promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmos.ipc.errors import InvalidArgument, LLMOSError, NoMemory, NotFound
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena
from llmos.services.memory.invariants import check
from llmos.services.memory.messages import Holding, Restore
from llmos.services.memory.restoring import restore

PROMPT = list(range(10))  # two full pages of four, and two tokens of a third


def spec(pages: int = 8, page_tokens: int = 4) -> messages.Arena:
    return messages.Arena(arena="a", pages=pages, page_tokens=page_tokens, page_bytes=1)


def arena(pages: int = 8) -> Arena:
    return Arena(spec(pages))


def computed(one: Arena, id: int, tokens: list[int] = PROMPT, tenant: str = "t") -> list[int]:
    """Reserve for a prompt and commit all of it."""
    pages, _ = one.reserve(id, tenant, tokens)
    one.commit([(id, [], len(tokens))])
    check(one)
    return pages


def test_a_first_prompt_gets_new_pages() -> None:
    assert arena().reserve(1, "t", PROMPT) == ([0, 1, 2], 0)


def test_extra_tokens_get_room_as_well() -> None:
    assert len(arena().reserve(1, "t", PROMPT, extra=7)[0]) == 5


def test_committed_full_pages_are_shared_at_once() -> None:
    one = arena()
    pages = computed(one, 1)
    assert one.reserve(2, "t", PROMPT) == ([*pages[:2], 3], 8)
    check(one)


def test_pages_that_are_not_committed_are_not_shared() -> None:
    one = arena()
    one.reserve(1, "t", PROMPT)
    one.commit([(1, [], 7)])
    assert one.reserve(2, "t", PROMPT)[1] == 4


def test_sixteen_tasks_with_one_prefix_hold_it_once() -> None:
    one = arena(2 + 16)
    computed(one, 0)
    for id in range(1, 16):
        assert one.reserve(id, "t", PROMPT)[1] == 8
    assert one.usage().owned == 2 + 16
    check(one)


def test_at_least_one_token_is_left_to_compute() -> None:
    one = arena()
    computed(one, 1, PROMPT[:8])
    assert one.reserve(2, "t", PROMPT[:8])[1] == 4


def test_another_tenant_never_shares() -> None:
    one = arena()
    mine = computed(one, 1)
    pages, cached = one.reserve(2, "other", PROMPT)
    assert cached == 0
    assert not set(pages) & set(mine)


def test_generated_tokens_are_shareable_too() -> None:
    one = arena()
    computed(one, 1)
    one.commit([(1, [10, 11, 12], 12)])
    assert one.reserve(2, "t", [*PROMPT, 10, 11, 12])[1] == 12


def test_freed_pages_stay_as_cache_until_the_space_is_needed() -> None:
    one = arena(4)
    computed(one, 1)
    one.free([1])
    check(one)
    usage = one.usage()
    assert (usage.free, usage.cached, usage.owned) == (2, 2, 0)
    assert one.reserve(2, "t", [99] * 12) == ([1, 2, 3], 0)
    usage = one.usage()
    assert (usage.free, usage.cached, usage.owned, usage.evictions) == (0, 1, 3, 1)
    check(one)


def test_two_tasks_that_computed_the_same_keep_one_copy_in_the_index() -> None:
    one = arena()
    first, _ = one.reserve(1, "t", PROMPT)
    second, _ = one.reserve(2, "t", PROMPT)
    one.commit([(1, [], 10), (2, [], 10)])
    check(one)
    assert one.reserve(3, "t", PROMPT)[0][:2] == first[:2]
    assert set(second).isdisjoint(first)
    one.free([2])
    check(one)
    assert one.usage().free == 8 - 4
    one.free([1, 3])
    check(one)
    assert (one.usage().cached, one.usage().free) == (2, 6)


def test_the_shared_copy_outlives_the_task_that_computed_it() -> None:
    one = arena()
    one.reserve(1, "t", PROMPT)
    one.reserve(2, "t", PROMPT)
    one.commit([(1, [], 10), (2, [], 10)])
    one.free([1])
    check(one)
    one.commit([(2, [10, 11], 12)])
    check(one)
    assert one.reserve(3, "t", [*PROMPT, 10, 11, 12])[1] == 12
    check(one)


def test_memory_that_would_not_fit_is_refused_with_the_figures() -> None:
    one = arena(4)
    computed(one, 1)
    with pytest.raises(NoMemory) as refused:
        one.reserve(2, "t", [7] * 12)
    assert refused.value.details == {"free": 1, "evictable": 0, "needed": 3}
    check(one)
    one.free([1])
    with pytest.raises(NoMemory) as refused:
        one.reserve(2, "t", PROMPT, extra=8)
    assert refused.value.details == {"free": 2, "evictable": 0, "needed": 3}
    assert one.usage().evictions == 0


def test_a_quota_bounds_what_a_tenant_owns() -> None:
    one = arena()
    one.reserve(1, "t", PROMPT, quota=4)
    with pytest.raises(NoMemory) as refused:
        one.reserve(2, "t", PROMPT, quota=4)
    assert refused.value.details["quota"] == 4
    one.reserve(3, "other", PROMPT, quota=4)
    assert one.grow([(1, 2), (1, 1)]) == [(1, []), (1, [6])]
    check(one)


def test_a_shared_page_counts_once_in_a_quota() -> None:
    one = arena()
    computed(one, 1)
    one.reserve(2, "t", PROMPT, quota=4)
    check(one)


def test_growing_gives_all_or_nothing_to_each_in_turn() -> None:
    one = arena(8)
    one.reserve(1, "t", PROMPT)
    one.reserve(2, "t", PROMPT)
    assert one.grow([(1, 1), (2, 4), (2, 1)]) == [(1, [6]), (2, []), (2, [7])]
    check(one)


def test_growing_evicts_what_nobody_holds() -> None:
    one = arena(4)
    computed(one, 1)
    one.free([1])
    one.reserve(2, "t", [9])
    assert one.grow([(2, 3)]) == [(2, [0, 1, 3])]
    check(one)


def test_a_commit_passes_over_what_was_freed_meanwhile() -> None:
    one = arena()
    one.reserve(1, "t", PROMPT)
    one.commit([(9, [1], 1), (1, [], 10)])
    assert one.tasks[1].computed == 10
    check(one)


def test_freeing_is_idempotent() -> None:
    one = arena()
    computed(one, 1)
    one.free([1, 1, 5])
    one.free([1])
    check(one)
    assert one.usage().owned == 0


REFUSED: dict[str, tuple[type[LLMOSError], Callable[[Arena], object]]] = {
    "no tokens": (InvalidArgument, lambda a: a.reserve(2, "t", [])),
    "a task that has pages": (InvalidArgument, lambda a: a.reserve(1, "t", [1])),
    "a negative token": (InvalidArgument, lambda a: a.reserve(2, "t", [-1])),
    "a token too large": (InvalidArgument, lambda a: a.reserve(2, "t", [1 << 32])),
    "negative extra": (InvalidArgument, lambda a: a.reserve(2, "t", [1], -1)),
    "computed beyond the tokens": (InvalidArgument, lambda a: a.commit([(1, [1], 12)])),
    "computed beyond the pages": (InvalidArgument, lambda a: a.commit([(1, [1] * 9, 13)])),
    "computed backwards": (InvalidArgument, lambda a: a.commit([(1, [], 9)])),
    "a bad token appended": (InvalidArgument, lambda a: a.commit([(1, [-1], 10)])),
    "a task twice": (InvalidArgument, lambda a: a.commit([(1, [1], 10), (1, [1], 10)])),
    "growing a stranger": (NotFound, lambda a: a.grow([(1, 1), (9, 1)])),
    "growing by a negative number": (InvalidArgument, lambda a: a.grow([(1, 1), (1, -1)])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_has_no_effect(case: str) -> None:
    one = arena()
    computed(one, 1)
    before = (one.usage(), list(one.tasks[1].tokens), one.tasks[1].computed)
    error, operation = REFUSED[case]
    with pytest.raises(error):
        operation(one)
    check(one)
    assert (one.usage(), list(one.tasks[1].tokens), one.tasks[1].computed) == before


@pytest.mark.parametrize(("pages", "page_tokens"), [(0, 4), (-1, 4), (1 << 25, 4), (4, 0)])
def test_an_arena_has_pages(pages: int, page_tokens: int) -> None:
    with pytest.raises(InvalidArgument):
        Arena(spec(pages, page_tokens))


def holdings(one: Arena) -> list[Holding]:
    return [
        Holding(id, task.tenant, list(task.pages), list(task.tokens), task.computed)
        for id, task in one.tasks.items()
    ]


def test_what_was_held_is_restored_and_shared_as_before() -> None:
    one = arena(12)
    computed(one, 1)
    one.reserve(2, "t", PROMPT)
    computed(one, 3, tenant="other")
    again = restore(Restore(arena=one.spec, tasks=holdings(one)))
    check(again)
    assert again.usage().owned == one.usage().owned == 7
    assert again.reserve(9, "t", PROMPT)[1] == 8
    check(again)
    again.free([1, 2, 3, 9])
    check(again)
    assert again.usage().owned == 0


def test_restoring_keeps_the_copy_that_is_shared_in_the_index() -> None:
    one = arena(12)
    one.reserve(1, "t", PROMPT)
    one.reserve(2, "t", PROMPT)
    one.commit([(2, [], 10)])
    one.commit([(1, [], 10)])  # the index has the pages of task 2
    one.reserve(3, "t", PROMPT)
    again = restore(Restore(arena=one.spec, tasks=holdings(one)))
    check(again)


@pytest.mark.parametrize(
    "tasks",
    [
        [Holding(1, "t", [0], PROMPT, 4), Holding(2, "u", [0], PROMPT, 4)],
        [Holding(1, "t", [0], PROMPT, 4), Holding(2, "t", [0], PROMPT[1:], 4)],
        [Holding(1, "t", [0], PROMPT, 4), Holding(2, "t", [0], PROMPT, 3)],
        [Holding(1, "t", [0, 1], PROMPT, 8), Holding(2, "t", [2, 1], PROMPT[:4] + [9] * 4, 8)],
        [Holding(1, "t", [0], PROMPT, 4), Holding(1, "t", [1], PROMPT, 4)],
        [Holding(1, "t", [0, 0], PROMPT, 4)],
        [Holding(1, "t", [8], PROMPT, 4)],
        [Holding(1, "t", [-1], PROMPT, 4)],
        [Holding(1, "t", [0], PROMPT, 5)],
        [Holding(1, "t", [0, 1, 2], PROMPT, 11)],
        [Holding(1, "t", [0], PROMPT, -1)],
        [Holding(1, "t", [0], [-1], 0)],
    ],
)
def test_what_cannot_be_held_is_not_restored(tasks: list[Holding]) -> None:
    with pytest.raises(InvalidArgument):
        restore(Restore(arena=spec(), tasks=tasks))


def test_what_an_adapter_computed_is_found_under_it_only_also_after_a_restart() -> None:
    one = arena()
    pages, _ = one.reserve(1, "t", PROMPT, adapter="fine")
    one.commit([(1, [], len(PROMPT))])
    assert one.reserve(2, "t", PROMPT)[1] == 0
    one.free([2])
    assert one.reserve(3, "t", PROMPT, adapter="fine") == ([*pages[:2], 3], 8)
    check(one)
    again = restore(Restore(arena=spec(), tasks=[Holding(1, "t", pages, PROMPT, 10, adapter="fine")]))
    assert again.reserve(2, "t", PROMPT)[1] == 0
    again.free([2])
    assert again.reserve(3, "t", PROMPT, adapter="fine")[1] == 8
    check(again)

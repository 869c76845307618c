"""A pool as a specification: who gets which slab, whose share is what, and what is refused."""

from __future__ import annotations

import pytest

from llmos.ipc.errors import InvalidArgument, NoMemory
from llmos.services.memory import messages
from llmos.services.memory.arena import Arena
from llmos.services.memory.arenas import Arenas
from llmos.services.memory.invariants import check_all
from llmos.services.memory.messages import Holding, Restore

SLAB_PAGES, PAGE_TOKENS = 4, 2


def spec(arena: str, slabs: int = 6, slab_pages: int = SLAB_PAGES) -> messages.Arena:
    return messages.Arena(
        arena=arena, pages=slabs * slab_pages, page_tokens=PAGE_TOKENS, page_bytes=1, pool="p", slabs=slabs,
        slab_pages=slab_pages, slab_bytes=SLAB_PAGES,
    )  # fmt: skip


@pytest.fixture
def arenas() -> Arenas:
    return Arenas()


@pytest.fixture
def red(arenas: Arenas) -> Arena:
    return arenas.declare(spec("red"))


@pytest.fixture
def blue(arenas: Arenas) -> Arena:
    return arenas.declare(spec("blue"))


def own(arena: Arena, id: int, pages: int) -> list[int]:
    """A task with so many pages; its tokens are like no other's."""
    return arena.reserve(id, "t", [id] * pages * PAGE_TOKENS)[0]


def cache(arena: Arena, id: int, pages: int) -> None:
    """So many pages of cache, from a task that has ended."""
    own(arena, id, pages)
    arena.commit([(id, [], pages * PAGE_TOKENS)])
    arena.free([id])


def held(arena: Arena) -> int:
    return arena.usage().slabs


def test_an_arena_holds_nothing_until_it_needs_it(arenas: Arenas, red: Arena, blue: Arena) -> None:
    assert (held(red), held(blue)) == (0, 0)
    assert len(own(red, 1, 6)) == 6
    assert held(red) == 2
    (pool,) = arenas.pools()
    assert (pool.slabs, pool.free, pool.share, pool.arenas) == (6, 4, 3, ["red", "blue"])


def test_one_arena_can_have_all_slabs(arenas: Arenas, red: Arena, blue: Arena) -> None:
    own(red, 1, 24)
    with pytest.raises(NoMemory) as refusal:
        own(blue, 1, 2)
    figures = {"free": 0, "evictable": 0, "needed": 2, "kept": 0}
    assert refusal.value.details == figures | {"owed": 3, "lenders": {"red": 3}}
    check_all(arenas)


def test_a_slab_without_pages_goes_first_then_the_coldest(arenas: Arenas, red: Arena, blue: Arena) -> None:
    cache(red, 1, 4)
    own(red, 2, 4)
    cache(red, 3, 4)
    own(red, 4, 12)
    red.free([4])  # computed nothing: three slabs are empty
    own(blue, 1, 12)
    assert red.usage().cached == 8
    own(blue, 2, 4)
    blue.free([1, 2])
    assert red.reserve(5, "t", [1] * 9)[1] == 0
    assert red.reserve(6, "t", [3] * 9)[1] == 8
    check_all(arenas)


def test_what_is_owned_is_never_taken(arenas: Arenas, red: Arena, blue: Arena) -> None:
    for id in range(1, 7):
        own(red, id, 4)
    red.free([2, 5])
    assert len(own(blue, 1, 8)) == 8
    with pytest.raises(NoMemory):
        own(blue, 2, 1)
    check_all(arenas)


def test_slabs_that_are_in_use_are_filled_first(arenas: Arenas, red: Arena, blue: Arena) -> None:
    for id in range(1, 13):
        own(red, id, 1)
    red.free([2, 3, 4, 6])  # the slabs have one, three and four pages in use
    page = own(red, 20, 1)[0]
    assert page // SLAB_PAGES == red.tasks[5].pages[0] // SLAB_PAGES
    check_all(arenas)


def test_without_borrowing_an_arena_gets_its_share(arenas: Arenas, red: Arena, blue: Arena) -> None:
    cache(red, 1, 4)
    pages, cached = red.reserve(2, "t", [1] * 9, 15, borrow=False)
    assert (len(pages), cached) == (12, 8)
    assert red.grow([(2, 1)], borrow=False) == [(2, [])]
    assert len(red.grow([(2, 1)])[0][1]) == 1
    check_all(arenas)


def test_an_arena_that_is_gone_leaves_its_slabs(arenas: Arenas, red: Arena, blue: Arena) -> None:
    own(red, 1, 24)
    arenas.drop("red")
    own(blue, 1, 24)
    assert arenas.pools()[0].share == 6
    arenas.drop("blue")
    assert arenas.pools() == []


def test_a_memory_that_was_started_anew_gives_each_what_it_had(
    arenas: Arenas, red: Arena, blue: Arena
) -> None:
    mine, yours = own(red, 1, 5), own(blue, 1, 5)
    again = Arenas()
    for name, pages in (("red", mine), ("blue", yours)):
        again.restore(Restore(arena=spec(name), tasks=[Holding(1, "t", pages, [1] * 10, 0)]))
    check_all(again)
    assert again["red"].tasks[1].pages == mine
    with pytest.raises(InvalidArgument, match="another arena"):
        again.restore(Restore(arena=spec("blue"), tasks=[Holding(1, "t", mine, [1] * 10, 0)]))
    check_all(again)
    assert again["blue"].tasks[1].pages == yours


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (spec("blue", slabs=7), "has 6 slabs"),
        (spec("blue", slab_pages=5), "do not fit"),
        (messages.Arena(arena="blue", pages=5, page_tokens=2, page_bytes=1, pool="p"), "slabs, and pages"),
    ],
)
def test_what_does_not_fit_the_pool_is_refused(
    arenas: Arenas, red: Arena, wrong: messages.Arena, why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        arenas.declare(wrong)
    check_all(arenas)


def test_a_pool_takes_no_more_arenas_than_it_has_slabs(arenas: Arenas) -> None:
    for number in range(2):
        arenas.declare(spec(f"a{number}", slabs=2))
    with pytest.raises(InvalidArgument, match="too few"):
        arenas.declare(spec("a2", slabs=2))
    check_all(arenas)

"""The page pool: runs where there are any, first fit by halves where not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.services.memory.pages import PagePool


def test_an_empty_pool_hands_out_one_run() -> None:
    pool = PagePool(64)
    assert pool.take(40) == list(range(40))
    assert pool.free == 24


def test_a_run_is_preferred_to_the_holes_before_it() -> None:
    pool = PagePool(16)
    pool.take(8)
    pool.give_back(1)
    pool.give_back(3)
    assert pool.take(4) == [8, 9, 10, 11]
    assert pool.take(1) == [1]


def test_where_no_run_is_long_enough_the_longest_halves_are_used() -> None:
    pool = PagePool(12)
    pool.take(12)
    for page in (0, 2, 3, 7, 8, 9, 10):
        pool.give_back(page)
    assert pool.take(6) == [7, 8, 9, 0, 2, 3]
    assert pool.free == 1


def test_taking_nothing_gives_nothing() -> None:
    assert PagePool(1).take(0) == []


@given(st.data())
def test_a_page_is_never_handed_out_twice(data: st.DataObject) -> None:
    pool = PagePool(40)
    taken: set[int] = set()
    for _ in range(30):
        if data.draw(st.booleans()) and taken:
            page = data.draw(st.sampled_from(sorted(taken)))
            pool.give_back(page)
            taken.remove(page)
        else:
            pages = pool.take(data.draw(st.integers(0, pool.free)))
            assert not taken & set(pages)
            taken |= set(pages)
        assert pool.free == 40 - len(taken)
        assert all(pool.is_free(page) is (page not in taken) for page in range(40))

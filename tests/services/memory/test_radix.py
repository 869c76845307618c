"""The prefix index by itself: matching, pinning, and the order of eviction."""

from __future__ import annotations

import pytest

from llmos.services.memory.radix import Node, RadixIndex, eviction_priority


def grow(index: RadixIndex, tenant: str, *keys: bytes, page: int = 0) -> Node:
    """Pin a path for these keys, inserting what is missing."""
    node = index.root(tenant)
    for number, key in enumerate(keys):
        child = node.children.get(key) or index.insert(node, key, page + number)
        index.pin(child)
        node = child
    return node


def test_a_match_is_the_longest_indexed_prefix() -> None:
    index = RadixIndex()
    grow(index, "a", b"1", b"2", b"3")
    assert [node.key for node in index.match("a", [b"1", b"2", b"9"])] == [b"1", b"2"]
    assert index.match("a", [b"2"]) == []


def test_another_tenant_never_matches() -> None:
    index = RadixIndex()
    grow(index, "a", b"1")
    assert index.match("b", [b"1"]) == []


def test_what_is_pinned_is_not_evictable() -> None:
    index = RadixIndex()
    end = grow(index, "a", b"1", b"2")
    assert index.evictable == 0
    index.unpin_path(end)
    assert index.evictable == 2


def test_leaves_go_first_and_a_path_goes_from_its_end() -> None:
    index = RadixIndex()
    index.unpin_path(grow(index, "a", b"1", b"2", b"3"))
    assert [node.key for node in index.evict(3)] == [b"3", b"2", b"1"]
    assert index.evictable == 0
    assert list(index.nodes()) == []


def test_the_longest_unused_goes_first() -> None:
    index = RadixIndex()
    index.unpin_path(grow(index, "a", b"old", page=0))
    index.unpin_path(grow(index, "a", b"new", page=1))
    index.unpin_path(grow(index, "a", b"old", page=0))
    assert [node.key for node in index.evict(1)] == [b"new"]


def test_a_prefix_stays_while_a_task_uses_what_lies_below() -> None:
    index = RadixIndex()
    index.unpin_path(grow(index, "a", b"1", b"2", b"3"))
    grow(index, "a", b"1", b"2")
    assert index.evictable == 1
    assert [node.key for node in index.evict(1)] == [b"3"]


@pytest.mark.parametrize(
    ("first", "second"), [((1, 9, 0), (2, 1, 0)), ((1, 5, 0), (1, 4, 0))], ids=["recency", "depth"]
)
def test_eviction_weighs_recency_then_depth(
    first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    assert eviction_priority(*first) < eviction_priority(*second)


def test_stale_candidates_do_not_pile_up() -> None:
    index = RadixIndex()
    for _ in range(1000):
        index.unpin_path(grow(index, "a", b"1"))
    assert len(index._heaps[0]) < 100


def test_the_same_tokens_under_another_adapter_are_another_tree() -> None:
    index = RadixIndex()
    node = index.insert(index.root("a", "one"), b"1", 0)
    index.pin(node)
    assert index.match("a", [b"1"], "one") == [node]
    assert index.match("a", [b"1"]) == index.match("a", [b"1"], "two") == index.match("aone", [b"1"]) == []
    index.unpin_path(node)
    index.evict(1)
    assert index.match("a", [b"1"], "one") == []
    assert not index._roots, "an empty tree is forgotten"

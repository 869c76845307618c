"""Shape buckets: few, and with little padding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.jax.execution.buckets import (
    bucket,
    chunk_buckets,
    decode_buckets,
    doubling_buckets,
    group,
    split,
)
from llmos.drivers.sdk.messages import Chunk


def test_decode_sizes_are_a_factor_apart_and_end_with_all_slots() -> None:
    assert decode_buckets(16) == [1, 4, 16]
    assert decode_buckets(24, factor=2) == [1, 2, 4, 8, 16, 24]
    assert decode_buckets(1) == [1]


def test_a_smallest_size_replaces_those_below_it() -> None:
    assert decode_buckets(16, smallest=2) == [2, 4, 16]
    assert decode_buckets(1, smallest=2) == [2]


@pytest.mark.parametrize(("limit", "sizes"), [(256, [64, 256]), (2048, [32, 128, 512, 2048]), (16, [16])])
def test_chunk_sizes(limit: int, sizes: list[int]) -> None:
    assert chunk_buckets(limit) == sizes


@pytest.mark.parametrize(
    ("length", "calls"),
    [(256, [256]), (30, [30]), (100, [64, 36]), (200, [200]), (300, [256, 44]), (600, [256, 256, 64, 24])],
)
def test_split_prefers_small_calls_where_a_large_one_is_mostly_padding(length: int, calls: list[int]) -> None:
    assert split(length, [64, 256]) == calls


@given(st.integers(1, 5000), st.sampled_from([[64, 256], [32, 128, 512], [7], [3, 100]]))
def test_split_covers_every_token_with_calls_that_fit(length: int, sizes: list[int]) -> None:
    calls = split(length, sizes)
    assert sum(calls) == length
    assert all(0 < call <= sizes[-1] for call in calls)
    assert sum(bucket(call, sizes) for call in calls) <= length + max(sizes)


def test_chunks_of_like_length_share_a_call_and_those_of_a_slot_keep_their_order() -> None:
    chunks = [Chunk(0, 1, 0, 64), Chunk(0, 2, 0, 60), Chunk(0, 3, 64, 64), Chunk(0, 4, 0, 300)]
    groups = group(chunks, [32, 64, 256])
    assert groups[0] == (64, True, [Chunk(0, 1, 0, 64), Chunk(0, 2, 0, 60)])
    assert groups[1] == (64, False, [Chunk(0, 3, 64, 64)])
    of_four = [call for _, _, calls in groups for call in calls if call.slot == 4]
    assert [call.start for call in of_four] == sorted(call.start for call in of_four)
    assert sum(call.length for call in of_four) == 300


@pytest.mark.parametrize(
    ("chunk", "sizes"), [(64, [64]), (512, [128, 256, 512]), (1536, [128, 256, 512, 1024, 1536])]
)
def test_on_accelerators_chunk_lengths_double(chunk: int, sizes: list[int]) -> None:
    assert doubling_buckets(chunk) == sizes

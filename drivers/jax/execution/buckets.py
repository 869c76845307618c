"""Shape buckets: the few batch sizes and chunk lengths that programs are compiled for. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest

from llmos.drivers.sdk.messages import Chunk


def decode_buckets(slots: int, smallest: int = 1, factor: int = 4) -> list[int]:
    """Batch sizes ``factor`` apart: 1, ``factor``, and so on, none under ``smallest``; then ``slots``."""
    sizes = []
    size = 1
    while size < slots:
        sizes.append(max(size, smallest))
        size *= factor
    return [*sizes, max(slots, smallest)]


def doubling_buckets(chunk_tokens: int, smallest: int = 128) -> list[int]:
    """Chunk lengths that double from ``smallest`` on; the last is ``chunk_tokens`` itself."""
    sizes = []
    while smallest < chunk_tokens:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, chunk_tokens]


def chunk_buckets(chunk_tokens: int, smallest: int = 32) -> list[int]:
    """Chunk lengths a factor of four apart, down to ``smallest``; the last is ``chunk_tokens`` itself."""
    sizes = [chunk_tokens]
    while sizes[0] // 4 >= smallest:
        sizes.insert(0, sizes[0] // 4)
    return sizes


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``size``."""
    return next(limit for limit in buckets if size <= limit)


def split(length: int, buckets: Sequence[int]) -> list[int]:
    """Cut ``length`` tokens into calls so that padding stays small: the tokens of each call.

    Full calls of the largest bucket come first; the rest takes calls of a smaller bucket while these are
    together at most three quarters as long as one call of the next larger bucket.
    """
    largest = buckets[-1]
    calls = [largest] * (length // largest)
    rest = length % largest
    while rest:
        size = _call_size(rest, buckets)
        calls.append(min(rest, size))
        rest -= calls[-1]
    return calls


def _call_size(rest: int, buckets: Sequence[int]) -> int:
    for small, large in pairwise(buckets):
        if -(-rest // small) * small * 4 <= large * 3:
            return small
    return bucket(rest, buckets)


def group(chunks: Sequence[Chunk], buckets: Sequence[int]) -> list[tuple[int, bool, list[Chunk]]]:
    """The calls that a step's chunks take, those together that one program can serve: (bucket, fresh, calls).

    A call is fresh if it starts a sequence. The calls of a slot keep their order.
    """
    groups = []
    for wave in zip_longest(*(_calls(chunk, buckets) for chunk in chunks)):
        alike: dict[tuple[int, bool], list[Chunk]] = {}
        for call in wave:
            if call is not None:
                alike.setdefault((bucket(call.length, buckets), call.start == 0), []).append(call)
        groups += [(size, fresh, calls) for (size, fresh), calls in alike.items()]
    return groups


def pieces(chunk: Chunk, size: int) -> list[Chunk]:
    """A chunk cut into so many tokens each, the last with what is left."""
    return _cut(chunk, [min(size, chunk.length - at) for at in range(0, chunk.length, size)])


def _calls(chunk: Chunk, buckets: Sequence[int]) -> list[Chunk]:
    return _cut(chunk, split(chunk.length, buckets))


def _cut(chunk: Chunk, lengths: Sequence[int]) -> list[Chunk]:
    starts = accumulate(lengths, initial=chunk.start)
    return [Chunk(chunk.step, chunk.slot, at, length) for at, length in zip(starts, lengths)]

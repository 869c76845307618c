"""What the host makes of chunks, starts and pages for the programs that take them: arrays, padded. Pure
functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from llmos.drivers.jax.decoder.forward import heading
from llmos.drivers.jax.execution.ledger import Limits, Slot
from llmos.drivers.jax.execution.spec import ADMIT_ROWS, GROW_ROWS
from llmos.drivers.jax.execution.state import pack_admission
from llmos.drivers.sdk.checks import BIAS_LIMIT
from llmos.drivers.sdk.messages import Chunk, Growth, Start

Item = TypeVar("Item")
Slots = Mapping[int, Slot]


def chunk(
    calls: Sequence[Chunk],
    slots: Slots,
    limits: Limits,
    shape: tuple[int, int, int],
    adapters: bool,
) -> np.ndarray:
    """What ``forward.prefill`` takes, int32 [height, heading + width + size], padded with empty rows.

    ``shape`` is (height, width, size), of as many rows, block tables and tokens.
    """
    height, width, size = shape
    table = heading(adapters)
    tokens = table + width
    packed = np.zeros((height, tokens + size), np.int32)
    packed[:, table:tokens] = limits.pages
    for row, call in enumerate(calls):
        slot = slots[call.slot]
        packed[row, :2] = call.start, call.length
        if adapters:
            packed[row, 2] = slot.adapter
        packed[row, table : table + slot.held] = slot.table
        part = slot.tokens[call.start : call.start + call.length]
        packed[row, tokens : tokens + call.length] = part
    return packed


def admission(
    starts: list[Start], slots: Slots, limits: Limits, width: int, adapters: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What ``state.admit`` takes for at most ``ADMIT_ROWS`` sequences, with block tables of ``width``;
    ``adapters`` says whether the model can have some."""
    tables = [start.pages + [limits.pages] * (width - len(start.pages)) for start in starts]
    tables += [[limits.pages] * width] * (ADMIT_ROWS - len(starts))
    own = [slots[start.slot].adapter for start in starts] if adapters else None
    packed: tuple[np.ndarray, np.ndarray] = pack_admission(starts, ADMIT_ROWS, limits.slots, tables, own)
    return packed


def tally(start: Start, limits: Limits) -> tuple[Any, ...]:
    """What ``state.tally`` takes of a sequence: its slot, its tokens, how many they are, and its biases."""
    tokens = np.zeros(limits.max_context, np.int32)
    tokens[: len(start.tokens)] = start.tokens
    bias = start.sampling.logit_bias
    ids = np.full(BIAS_LIMIT, limits.vocab_size, np.int32)
    values = np.zeros(BIAS_LIMIT, np.float32)
    ids[: len(bias)] = list(bias)
    values[: len(bias)] = list(bias.values())
    counts = (np.int32(start.prompt), np.int32(len(start.tokens)))
    return np.int32(start.slot), tokens, *counts, ids, values


def growth(grow: Sequence[Growth], slots: Slots, spare_slot: int) -> Iterator[np.ndarray]:
    """What ``state.grow`` takes, int32 [3, GROW_ROWS] at a time: slots, columns of their tables, and pages.

    The ``slots`` have grown already.
    """
    cells: list[tuple[int, int, int]] = []
    held = {each.slot: slots[each.slot].held for each in grow}
    for each in reversed(grow):
        held[each.slot] -= len(each.pages)
        first = held[each.slot]
        cells += [(each.slot, first + i, page) for i, page in enumerate(each.pages)]
    for part in parts(cells, GROW_ROWS, (spare_slot + 1, 0, 0)):
        yield np.asarray(part, np.int32).T.copy()


def parts(items: list[Item], size: int, padding: Item) -> Iterator[list[Item]]:
    """The items, so many at a time, the last with padding."""
    for at in range(0, len(items), size):
        part = items[at : at + size]
        yield part + [padding] * (size - len(part))

"""What the host packs for programs: padded arrays in which nothing is written for rows that are not there."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmos.drivers.jax.execution import packing
from llmos.drivers.jax.execution.ledger import Ledger, Limits, Slot
from llmos.drivers.jax.execution.spec import ADMIT_ROWS, GROW_ROWS
from llmos.drivers.sdk.messages import Chunk, Growth, Quantum, Sampling, Start

LIMITS = Limits(slots=4, pages=32, page_tokens=2, max_context=8, chunk_tokens=16, vocab_size=100)
WIDTH = 5


def entered(*starts: Start, grow: list[Growth] | None = None, adapter: int = 0) -> dict[int, Slot]:
    """The slots of a ledger that these sequences have entered."""
    ledger = Ledger(LIMITS)
    ledger.enter(Quantum(id=1, model="m", steps=1, start=list(starts), grow=grow or []))
    for slot in ledger.slots.values():
        slot.adapter = adapter
    return ledger.slots


def start(slot: int, **fields: Any) -> Start:
    values: dict[str, Any] = {"tokens": [1, 2, 3], "prompt": 2, "pages": [9, 7], "limit": 6}
    return Start(slot=slot, **(values | fields))


def test_a_chunk_has_its_place_its_pages_and_its_tokens() -> None:
    packed = packing.chunk([Chunk(0, 2, 1, 2)], entered(start(2)), LIMITS, (2, WIDTH, 4), adapters=False)
    assert packed.tolist() == [
        [1, 2, *[9, 7, 32, 32, 32], *[2, 3, 0, 0]],
        [0, 0, *[32] * WIDTH, *[0] * 4],
    ]


def test_a_chunk_for_adapted_programs_names_the_adapter() -> None:
    slots = entered(start(2), adapter=3)
    packed = packing.chunk([Chunk(0, 2, 0, 3)], slots, LIMITS, (1, WIDTH, 3), adapters=True)
    assert packed.tolist() == [[0, 3, 3, *[9, 7, 32, 32, 32], *[1, 2, 3]]]


def test_an_admission_has_rows_for_the_spare_slot_and_tables_of_the_spare_page() -> None:
    ints, floats = packing.admission([start(2)], entered(start(2)), LIMITS, WIDTH, adapters=False)
    assert len(ints) == len(floats) == ADMIT_ROWS
    assert ints[:, 0].tolist() == [2] + [LIMITS.slots] * (ADMIT_ROWS - 1)
    assert ints[0, -WIDTH:].tolist() == [9, 7, 32, 32, 32]
    assert (ints[1:, -WIDTH:] == 32).all()


def test_an_admission_to_a_model_with_adapters_has_a_column_more() -> None:
    plain, own = (
        packing.admission([start(2)], entered(start(2), adapter=3), LIMITS, WIDTH, adapters)[0]
        for adapters in (False, True)
    )
    assert np.array_equal(own[:, :-1], plain)
    assert own[:, -1].tolist() == [3] + [0] * (ADMIT_ROWS - 1)


def test_a_tally_counts_prompt_and_known_tokens_and_pads_biases_out_of_the_vocabulary() -> None:
    sampling = Sampling(logit_bias={5: 1.5, 8: -2.0})
    slot, tokens, prompt, known, ids, bias = packing.tally(start(2, sampling=sampling), LIMITS)
    assert (slot, prompt, known) == (2, 2, 3)
    assert tokens.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert ids[:2].tolist() == [5, 8]
    assert (ids[2:] == LIMITS.vocab_size).all()
    assert bias[:2].tolist() == [1.5, -2.0]
    assert not bias[2:].any()


def test_grown_pages_go_behind_those_that_a_slot_had() -> None:
    grow = [Growth(1, [20]), Growth(0, [21]), Growth(1, [22, 23])]
    slots = entered(start(0), start(1, pages=[3]), grow=grow)
    (cells,) = packing.growth(grow, slots, LIMITS.slots)
    assert cells.shape == (3, GROW_ROWS)
    put = {(slot, column): page for slot, column, page in cells.T.tolist() if slot <= LIMITS.slots}
    assert put == {(1, 1): 20, (0, 2): 21, (1, 2): 22, (1, 3): 23}


def test_many_grown_pages_take_several_arrays() -> None:
    slots = {0: Slot([1], 1, 200, "greedy", 0, 1, held=GROW_ROWS + 1)}
    arrays = list(packing.growth([Growth(0, list(range(GROW_ROWS + 1)))], slots, LIMITS.slots))
    assert [int((cells[0] == 0).sum()) for cells in arrays] == [GROW_ROWS, 1]


def test_parts_are_alike_in_size() -> None:
    assert list(packing.parts([1, 2, 3], 2, -1)) == [[1, 2], [3, -1]]
    assert list(packing.parts([], 2, -1)) == []

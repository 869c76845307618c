"""The host's picture of the slots, and everything that it refuses before any effect."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.drivers.jax.execution.ledger import Ledger, Limits
from llmos.drivers.sdk.messages import Chunk, Growth, Quantum, Sampling, Start
from llmos.ipc.errors import InvalidArgument

LIMITS = Limits(slots=4, pages=32, page_tokens=8, max_context=64, chunk_tokens=16, vocab_size=100)


def start(slot: int = 0, **fields: Any) -> Start:
    values: dict[str, Any] = {"tokens": [1, 2, 3], "prompt": 3, "pages": [0, 1], "limit": 12}
    return Start(slot=slot, **(values | fields))


LONG = start(tokens=[1] * 17, prompt=17, limit=40, pages=[0, 1, 2])
TIGHT = start(limit=40, pages=[0])


def quantum(steps: int = 4, **fields: Any) -> Quantum:
    return Quantum(id=1, model="m", steps=steps, **fields)


def entered(**fields: Any) -> Ledger:
    ledger = Ledger(LIMITS)
    ledger.enter(quantum(start=[start(**fields)]))
    return ledger


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": [start(slot=4)]}, "slot 4"),
        ({"start": [start(slot=-1)]}, "slot -1"),
        ({"start": [start(), start()]}, "occupied"),
        ({"start": [start(pages=[32])]}, "page 32"),
        ({"start": [start(pages=[-1])]}, "page -1"),
        ({"start": [start(pages=list(range(9)))]}, "more pages"),
        ({"start": [start(tokens=[100])]}, "prompt"),
        ({"start": [start(tokens=[1, 2, 100])]}, "outside"),
        ({"start": [start(tokens=[])]}, "0 tokens"),
        ({"start": [start(prompt=0)]}, "prompt 0"),
        ({"start": [start(cached=3)]}, "cached 3"),
        ({"start": [start(limit=3)]}, "limit 3"),
        ({"start": [start(limit=65)]}, "limit 65"),
        ({"start": [start(stop=[100])]}, "stop"),
        ({"start": [start(stop=[1] * 17)]}, "stop"),
        ({"start": [start(tokens=[1] * 20, prompt=20, pages=[0], cached=16, limit=30)]}, "grow"),
        ({"start": [start(sampling=Sampling(temperature=-1.0))]}, "temperature"),
        ({"start": [start(sampling=Sampling(temperature=float("nan")))]}, "temperature"),
        ({"start": [start(sampling=Sampling(top_p=1.5))]}, "top_p"),
        ({"start": [start(sampling=Sampling(top_k=-1))]}, "top_k"),
        ({"start": [start(sampling=Sampling(seed=2**32))]}, "seed"),
        ({"start": [start(sampling=Sampling(repetition_penalty=0.0))]}, "repetition_penalty"),
        ({"start": [start(sampling=Sampling(logit_bias={100: 1.0}))]}, "logit bias"),
        ({"start": [start(sampling=Sampling(logit_bias={1: float("inf")}))]}, "logit bias"),
        ({"release": [1]}, "slot 1"),
        ({"grow": [Growth(2, [3])]}, "slot 2"),
        ({"decode": [0]}, "slot 0"),
        ({"start": [start()], "decode": [0, 0]}, "twice"),
        ({"start": [start()], "chunks": [Chunk(0, 1, 0, 3)]}, "slot 1"),
        ({"start": [start()], "chunks": [Chunk(4, 0, 0, 3)]}, "step 4"),
        ({"start": [start()], "chunks": [Chunk(0, 0, 1, 2)]}, "starts at 0"),
        ({"start": [start()], "chunks": [Chunk(0, 0, 0, 4)]}, "known tokens"),
        ({"start": [start()], "chunks": [Chunk(0, 0, 0, 0)]}, "length 0"),
        ({"start": [start(pages=[])], "chunks": [Chunk(0, 0, 0, 3)]}, "grow"),
        ({"start": [LONG], "chunks": [Chunk(0, 0, 0, 17)]}, "exceed 16"),
        ({"start": [TIGHT], "chunks": [Chunk(0, 0, 0, 3)], "decode": [0], "steps": 9}, "grow"),
        ({"steps": -1}, "steps"),
        ({"steps": 100000}, "steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_executed_is_refused(fields: dict[str, Any], message: str) -> None:
    ledger = Ledger(LIMITS)
    with pytest.raises(InvalidArgument, match=message):
        ledger.check(quantum(**fields))
    assert ledger.slots == {}


def test_check_changes_nothing() -> None:
    ledger = entered()
    before = repr(ledger)
    ledger.check(quantum(release=[0], start=[start(), start(slot=1, pages=[4])], grow=[Growth(1, [9])]))
    assert repr(ledger) == before


def test_a_slot_may_be_released_and_started_in_one_quantum() -> None:
    ledger = entered()
    ledger.check(quantum(release=[0], start=[start(pages=[5, 6])], chunks=[Chunk(0, 0, 0, 3)], decode=[0]))


def test_a_sequence_decodes_once_it_is_prefilled_and_until_its_limit() -> None:
    ledger = entered(limit=6)
    assert ledger.ready([0]) == []
    assert not ledger.fill(Chunk(0, 0, 0, 2))
    assert ledger.ready([0]) == []
    assert ledger.fill(Chunk(0, 0, 2, 1))
    produced = 1
    while ledger.ready([0]):
        ledger.advance(0)
        produced += 1
    assert produced == 3


def test_the_last_token_of_a_sequence_needs_no_page() -> None:
    ledger = entered(tokens=[1] * 15, prompt=15, limit=17, pages=[0, 1])
    ledger.check(quantum(steps=5, chunks=[Chunk(0, 0, 0, 15)], decode=[0]))


def test_cached_tokens_are_not_prefilled() -> None:
    ledger = entered(tokens=[1] * 12, prompt=12, cached=8, limit=20)
    with pytest.raises(InvalidArgument, match="starts at 8"):
        ledger.check(quantum(chunks=[Chunk(0, 0, 0, 12)]))
    ledger.check(quantum(chunks=[Chunk(0, 0, 8, 4)]))


def test_a_finished_slot_is_not_asked_for_pages() -> None:
    ledger = entered(limit=40, pages=[0])
    ledger.fill(Chunk(0, 0, 0, 3))
    ledger.slots[0].finished = True
    ledger.check(quantum(steps=30, decode=[0]))


def test_a_quantum_without_steps_may_still_release() -> None:
    ledger = entered()
    ledger.check(quantum(steps=0, release=[0]))
    with pytest.raises(InvalidArgument, match="step 0"):
        ledger.check(quantum(steps=0, chunks=[Chunk(0, 0, 0, 3)]))

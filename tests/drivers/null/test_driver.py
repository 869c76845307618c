"""The null driver keeps the driver contract, so that what is tested on it holds for real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.null.driver import NullDriver, next_token
from llmos.drivers.sdk.messages import (
    Chunk,
    Growth,
    LoadAdapter,
    LoadedModel,
    LoadRequest,
    Quantum,
    Start,
    Step,
)
from llmos.ipc.errors import Busy, InvalidArgument, NotFound


@pytest.fixture
def driver() -> NullDriver:
    made = NullDriver()
    request = LoadRequest(
        model="m",
        source="",
        slots=2,
        pages=8,
        page_tokens=4,
        max_context=32,
        chunk_tokens=8,
        adapters=1,
    )
    made.load(request, lambda progress: None)
    return made


def start(slot: int = 0, tokens: list[int] | None = None, **more: Any) -> Start:
    tokens = tokens or [1, 2, 3]
    fields: dict[str, Any] = {"pages": [0, 1, 2], "limit": 12, **more}
    return Start(slot=slot, tokens=tokens, prompt=len(tokens), **fields)


def run(driver: NullDriver, steps: int, **fields: Any) -> list[Step]:
    return [pending() for pending in driver.execute(Quantum(id=1, model="m", steps=steps, **fields))]


def test_a_sequence_continues_as_its_tokens_say_wherever_it_sits(driver: NullDriver) -> None:
    alone = run(driver, 3, start=[start()], chunks=[Chunk(0, 0, 0, 3)], decode=[0])
    tokens = [step.tokens[0] for step in alone]
    assert tokens[0] == next_token([1, 2, 3])
    again = start(1, [1, 2, 3, *tokens[:2]], pages=[3, 4, 5])
    (step,) = run(driver, 1, release=[0], start=[again], chunks=[Chunk(0, 1, 0, 5)])
    assert step.tokens == [tokens[2]]


def test_length_and_stop_end_a_sequence_and_it_then_holds_still(driver: NullDriver) -> None:
    steps = run(driver, 8, start=[start(limit=5)], chunks=[Chunk(0, 0, 0, 3)], decode=[0])
    assert [step.finished for step in steps] == [[], [(0, "length")]]
    stop = next_token([9])
    (step,) = run(driver, 8, start=[start(1, [9], stop=[stop])], chunks=[Chunk(0, 1, 0, 1)], decode=[1])
    assert step.finished == [(1, "stop")]


@pytest.mark.parametrize(
    "fields",
    [
        {"release": [0]},
        {"decode": [1]},
        {"start": [start(slot=2)]},
        {"start": [start(), start()]},
        {"start": [start(cached=3)]},
        {"start": [start(pages=[8])]},
        {"grow": [Growth(0, [1])]},
        {"chunks": [Chunk(0, 1, 0, 1)]},
    ],
)
def test_what_names_a_slot_or_page_that_is_not_there_is_refused(driver: NullDriver, fields: Any) -> None:
    with pytest.raises(InvalidArgument):
        run(driver, 1, **fields)


def test_an_unknown_model_is_refused_and_reset_empties_a_known_one(driver: NullDriver) -> None:
    other = Quantum(id=1, model="other", steps=1)
    with pytest.raises(NotFound):
        driver.execute(other)
    run(driver, 1, start=[start()])
    driver.reset("m")
    run(driver, 1, start=[start()])


def test_tokens_and_kv_depend_on_the_adapter(driver: NullDriver, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    load = lambda name: driver.load_adapter(LoadAdapter(model="m", adapter=name, source=str(tmp_path)))()()  # noqa: E731
    with pytest.raises(InvalidArgument, match="adapter x is not loaded"):
        run(driver, 1, start=[start(adapter="x")])
    load("x")
    with pytest.raises(Busy, match="all 1 adapters"):
        load("y")
    (step,) = run(driver, 1, start=[start(adapter="x")], chunks=[Chunk(0, 0, 0, 3)])
    assert step.tokens == [next_token([1, 2, 3], "x")] != [next_token([1, 2, 3])]
    with pytest.raises(Busy, match="in use"):
        driver.unload_adapter("m", "x")
    with pytest.raises(InvalidArgument, match="does not hold the KV"):
        run(driver, 1, start=[start(1, [1, 2, 3, 4], cached=3)])
    run(driver, 0, release=[0])
    driver.unload_adapter("m", "x")
    with pytest.raises(NotFound):
        driver.unload_adapter("m", "x")


def shared(*sizes: int) -> tuple[NullDriver, list[LoadedModel]]:
    """Models with pages of so many tokens in one memory of 32 slabs."""
    driver = NullDriver()
    requests = [
        LoadRequest(
            model=f"m{i}", source="", slots=2, page_tokens=size, max_context=64, chunk_tokens=16,
            arena="shared", arena_bytes=32 * 144,
        )
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    return driver, [driver.load(request, lambda progress: None) for request in requests]


def test_models_share_one_memory_of_slabs() -> None:
    _, (small, large) = shared(4, 16)
    assert small.pool == large.pool == "shared"
    assert (small.slabs, small.slab_bytes) == (large.slabs, large.slab_bytes) == (32, 144)
    assert (small.slab_pages, large.slab_pages) == (6, 2)
    assert small.pages == 32 * 6


def test_a_page_that_does_not_fit_in_a_slab_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="make the arena larger"):
        shared(4, 64)


def test_a_slab_that_was_given_to_another_model_is_missed() -> None:
    driver, _ = shared(4, 16)

    def go(model: str, pages: list[int], **fields: Any) -> None:
        quantum = Quantum(
            id=1, model=model, steps=1, start=[start(pages=pages)], chunks=[Chunk(0, 0, 0, 3)], **fields
        )
        for pending in driver.execute(quantum):
            pending()

    go("m0", [6, 7])  # in slab 1
    go("m1", [2])  # slab 1 as well
    with pytest.raises(InvalidArgument, match="in a slab that 'm1' was given"):
        list(driver.execute(Quantum(id=2, model="m0", steps=1, decode=[0])))


def test_memory_is_given_back_with_the_last_model() -> None:
    driver, _ = shared(4, 16)
    driver.unload("m0")
    driver.unload("m1")
    request = LoadRequest(model="m", source="", page_tokens=4, pages=64, arena="shared")
    assert driver.load(request, lambda progress: None).slabs == 32

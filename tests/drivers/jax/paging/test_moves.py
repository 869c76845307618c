"""Pages leave the device and come back bit for bit, and a sequence goes on from them as it would have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.paging import pages
from llmos.drivers.jax.paging.link import Link, RowTier, view
from llmos.drivers.jax.paging.moves import Mover
from llmos.drivers.sdk.messages import LoadRequest, Move, Moved, Sampling
from llmos.ipc.errors import IOFailure, NoMemory

KEY = bytes(32)
COUNT = 40


def caches() -> list[Any]:
    """Leaves of several types and shapes."""
    rng = np.random.default_rng(0)
    kinds = [((2, 4, 8), jnp.float32), ((2, 4, 8), jnp.bfloat16), ((2, 4), jnp.int8), ((3,), jnp.float32)]
    leaves = []
    for shape, kind in kinds:
        leaves.append(jnp.asarray(50 * rng.standard_normal((COUNT, *shape))).astype(kind))
    return [tuple(leaves[:2]), tuple(leaves[2:])]


class FakeDevice:
    """An engine with caches and nothing else."""

    def __init__(self) -> None:
        self.caches = caches()

    def read_pages(self, numbers: list[int]) -> Sequence[jax.Array]:
        rows: Sequence[jax.Array] = jax.jit(pages.gather)(self.caches, jnp.asarray(numbers))
        return rows

    def write_pages(self, numbers: list[int], rows: Sequence[jax.Array]) -> None:
        self.caches = jax.jit(pages.scatter, donate_argnums=0)(self.caches, rows, jnp.asarray(numbers))

    def bits(self, number: int) -> bytes:
        return b"".join(np.asarray(leaf[number]).tobytes() for leaf in jax.tree.leaves(self.caches))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture(params=["cpu", "bus"])
def link(request: pytest.FixtureRequest) -> Link:
    """As on a device that computes in RAM, and as on one behind a bus."""
    return Link(jax.devices("cpu")[0], request.param == "bus")


@pytest.fixture
def mover(device: FakeDevice, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mover]:
    monkeypatch.setenv("LLMOS_STATE", str(tmp_path))
    shapes = jax.eval_shape(caches)
    made = Mover(device, "m", shapes, link, RowTier(link, pages.row(shapes), COUNT), COUNT)
    yield made
    made.close()


def run(mover: Mover, source: Any, target: Any, pairs: list[tuple[int, int]], key: bytes = KEY) -> Moved:
    return mover.move(Move(model="m", source=source, target=target, pages=pairs, tenant="a"), key)()()


def test_a_row_is_the_bytes_of_its_page_in_the_order_of_the_leaves(device: FakeDevice) -> None:
    rows = device.read_pages([7, 3])
    assert [row.dtype for row in rows] == [np.uint8] * 2
    assert [view(row).tobytes() for row in rows] == [device.bits(7), device.bits(3)]
    assert rows[0].nbytes == pages.page_bytes(device.caches)


def test_pages_come_back_to_other_places_bit_for_bit(device: FakeDevice, mover: Mover) -> None:
    before = [device.bits(page) for page in range(COUNT)]
    away = [(page, (7 * page) % COUNT) for page in range(23)]
    moved = run(mover, "device", "host", away)
    assert moved.bytes == 23 * len(before[0])
    run(mover, "host", "disk", [(block, block) for _, block in away])
    run(mover, "disk", "host", [(block, (block + 1) % COUNT) for _, block in away])
    run(mover, "host", "device", [((block + 1) % COUNT, COUNT - 1 - page) for page, block in away])
    after = [device.bits(page) for page in range(COUNT)]
    assert after[:17] == before[:17]
    assert after[17:] == [before[COUNT - 1 - page] for page in range(17, COUNT)]


def test_pages_go_straight_to_the_disk_and_back(device: FakeDevice, mover: Mover) -> None:
    before = device.bits(5)
    run(mover, "device", "disk", [(5, 0), (6, 1)])
    run(mover, "disk", "device", [(0, 9)])
    assert device.bits(9) == before
    with pytest.raises(IOFailure, match="another tenant"):
        run(mover, "disk", "device", [(1, 9)], key=bytes([1] * 32))


def test_what_was_read_before_later_steps_is_what_leaves(device: FakeDevice, mover: Mover) -> None:
    before = device.bits(0)
    pending = mover.move(Move(model="m", source="device", target="host", pages=[(0, 0)], tenant="a"), b"")
    device.write_pages([0], device.read_pages([1]))
    pending()()
    run(mover, "host", "device", [(0, 2)])
    assert device.bits(2) == before


def test_an_error_is_raised_once_every_row_has_ended(mover: Mover) -> None:
    begun: list[int] = []

    def put(index: int, data: bytes | memoryview) -> None:
        begun.append(index)
        if index == 0:
            raise IOFailure("the disk failed")

    with pytest.raises(IOFailure, match="the disk failed"):
        mover.save(list(range(16)), put)()
    assert sorted(begun) == list(range(16))


def test_a_block_in_ram_that_was_never_written_is_refused(mover: Mover) -> None:
    with pytest.raises(IOFailure, match="block 3 in RAM holds nothing"):
        run(mover, "host", "device", [(3, 0)])


def test_more_host_pages_than_the_machine_has_memory_are_refused(link: Link) -> None:
    with pytest.raises(NoMemory, match="host pages"):
        RowTier(link, pages.row(jax.eval_shape(caches)), 1 << 50)


def test_a_row_outlives_the_block_that_it_was(device: FakeDevice, link: Link) -> None:
    tier = RowTier(link, pages.row(device.caches), COUNT)
    tier[0] = device.bits(4)
    held = tier[0]
    tier[0] = device.bits(5)
    assert (bytes(held), bytes(tier[0])) == (device.bits(4), device.bits(5))


@pytest.mark.parametrize("count", [1, 3, 4, 37, 64, 100])
def test_moves_are_cut_into_few_programs_without_padding(count: int) -> None:
    cut = pages.parts(count, [1, 4, 16])
    assert sum(cut) == count
    assert cut == sorted(cut, reverse=True)
    assert len(cut) <= count // 16 + 6


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_sequence_goes_on_from_moved_pages_as_it_would_have(
    tiny_folder: Path,
    cache_folder: Path,
    helpers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_dtype: Any,
) -> None:
    monkeypatch.setenv("LLMOS_STATE", str(tmp_path))
    driver = JaxDriver("cpu")
    loaded = driver.load(
        LoadRequest(
            model="tiny", source=str(tiny_folder), cache=str(cache_folder), page_tokens=8, pages=64, slots=2,
            max_context=128, chunk_tokens=64, host_pages=8, disk_pages=8, kv_dtype=kv_dtype,
        ),
        helpers.ignore,
    )  # fmt: skip
    assert (loaded.host_pages, loaded.disk_pages) == (8, 8)
    runner = helpers.Runner(driver, loaded)
    prompt = list(range(3, 40))
    (whole,) = runner.run(helpers.Task(prompt, 24))
    (begun,) = runner.run(helpers.Task(prompt, 9))
    known = prompt + begun
    held = runner.pages(0, len(known))

    def move(source: Any, target: Any, pairs: list[tuple[int, int]]) -> None:
        request = Move(model="tiny", source=source, target=target, pages=pairs, tenant="a")
        assert driver.move(request, KEY)()().bytes == len(pairs) * loaded.page_bytes

    move("device", "host", [(page, index) for index, page in enumerate(held)])
    runner.run(helpers.Task([50] * 60, 30))
    move("host", "disk", [(index, 7 - index) for index in range(len(held))])
    move("disk", "device", [(7 - index, 40 + index) for index in range(len(held))])
    table = [40 + index for index in range(len(held))] + [60, 61]
    resumed = helpers.Task(known, 15, prompt=len(prompt), cached=len(known) - 1, pages=table)
    assert begun + runner.run(resumed)[0] == whole
    driver.unload("tiny")


def test_a_sequence_goes_on_from_a_file_in_another_driver(
    tiny_folder: Path, cache_folder: Path, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_STATE", str(tmp_path))
    request = LoadRequest(
        model="tiny", source=str(tiny_folder), cache=str(cache_folder), page_tokens=8, pages=64, slots=2,
        max_context=128, chunk_tokens=64,
    )  # fmt: skip
    file: dict[int, bytes] = {}
    prompt, sampling = list(range(3, 40)), Sampling(temperature=0.9, seed=5, repetition_penalty=1.1)
    first = JaxDriver("cpu")
    runner = helpers.Runner(first, first.load(request, helpers.ignore))
    (whole,) = runner.run(helpers.Task(prompt, 24, sampling=sampling))
    (begun,) = runner.run(helpers.Task(prompt, 9, sampling=sampling))
    held = runner.pages(0, len(prompt) + 9)
    first.save("tiny", 0, held, lambda index, data: file.update({index: bytes(data)}))()()
    first.unload("tiny")
    second = JaxDriver("cpu")
    runner = helpers.Runner(second, second.load(request, helpers.ignore))
    second.restore("tiny", 0, [30 + index for index in range(len(held))], lambda index: file[index])()()
    table = [30 + index for index in range(len(held))] + [60, 61]
    known = prompt + begun
    resumed = helpers.Task(
        known, 15, prompt=len(prompt), cached=len(known) - 1, pages=table, sampling=sampling
    )
    assert begun + runner.run(resumed)[0] == whole
    second.unload("tiny")

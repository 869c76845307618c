"""Several models in one pool: each computes what it computes alone, whoever had its pages before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from llmos.drivers.jax import platform
from llmos.drivers.jax.attention.shared import Geometry
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.paging import pool, sharing
from llmos.drivers.sdk.messages import Chunk, LoadedModel, LoadRequest, Move, Sampling
from llmos.ipc.errors import InvalidArgument, NoMemory

KEY = bytes(32)
SAMPLED = Sampling(temperature=0.9, seed=11, repetition_penalty=1.1)
PROMPTS = [list(range(3, 60)), [5, 9, 77, 31], [88] * 17]
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "deep": {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    "wide": {"num_hidden_layers": 1, "hidden_size": 64, "num_key_value_heads": 4, "vocab_size": 120},
}


@dataclass
class Models:
    """Checkpoints of several shapes, and how they are loaded."""

    folders: dict[str, Path]
    cache: Path
    helpers: Any

    def load(self, driver: JaxDriver, name: str, **changes: Any) -> Any:
        """A runner for a model, loaded with these changes to the request."""
        fields: dict[str, Any] = {
            "model": name,
            "source": str(self.folders[name]),
            "cache": str(self.cache),
            "page_tokens": 8,
            "slots": 4,
            "max_context": 128,
            "chunk_tokens": 64,
        }
        request = LoadRequest(**fields | {"arena": "shared", "arena_bytes": 24 << 20} | changes)
        return self.helpers.Runner(driver, driver.load(request, self.helpers.ignore))

    def alone(self, name: str, **changes: Any) -> list[list[int]]:
        """What a model makes of the tasks with pages of its own."""
        driver = JaxDriver("cpu")
        runner = self.load(driver, name, arena="own", pages=128, **changes)
        made: list[list[int]] = runner.run(*self.tasks())
        driver.unload(runner.loaded.model)
        return made

    def tasks(self, loaded: LoadedModel | None = None, slab: int = 0) -> list[Any]:
        """Sequences of 30 tokens more than their prompts; with ``loaded`` they are in pages of that slab."""
        made = []
        for number, prompt in enumerate(PROMPTS):
            pages = []
            if loaded is not None:
                width = -(-(len(prompt) + 30) // loaded.page_tokens)
                pages = [slab * loaded.slab_pages + number + i * len(PROMPTS) for i in range(width)]
                assert pages[-1] < (slab + 1) * loaded.slab_pages
            sampling = SAMPLED if number else Sampling()
            made.append(self.helpers.Task(prompt, 30, pages=pages, sampling=sampling))
        return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path, helpers: Any) -> Models:
    folders = {}
    for seed, (name, changes) in enumerate(SHAPES.items()):
        config = helpers.TINY | changes
        tensors = helpers.random_tensors(config, seed)
        folders[name] = helpers.write_folder(tmp_path_factory.mktemp(name), config, tensors)
    return Models(folders, cache_folder, helpers)


@pytest.fixture(scope="module")
def alone(models: Models) -> dict[str, list[list[int]]]:
    return {name: models.alone(name) for name in SHAPES}


@pytest.fixture(scope="module")
def runners(models: Models) -> Iterator[dict[str, Any]]:
    """All the models in one pool."""
    driver = JaxDriver("cpu")
    yield {name: models.load(driver, name) for name in SHAPES}
    for name in list(driver._engines):
        driver.unload(name)


@pytest.fixture
def driver() -> Iterator[JaxDriver]:
    driver = JaxDriver("cpu")
    yield driver
    for name in list(driver._engines):
        driver.unload(name)


def fill(driver: JaxDriver, value: float) -> None:
    """What other models might have left in every slab that is handed out."""
    for each in driver._pools._pools.values():
        numbers = jnp.full(each.array[:-1].shape, value, each.name)
        if each.array.dtype != numbers.dtype:
            numbers = jax.lax.bitcast_convert_type(numbers, each.array.dtype)
        each.array = each.array.at[:-1].set(numbers)


@pytest.mark.parametrize("name", SHAPES)
def test_no_program_copies_the_pool(runners: dict[str, Any], name: str) -> None:
    check_programs(runners[name].driver, name)


def test_models_of_any_shape_compute_in_slabs_that_change_hands_what_they_compute_alone(
    runners: dict[str, Any], models: Models, alone: dict[str, list[list[int]]]
) -> None:
    sizes = {(each.loaded.pool, each.loaded.slabs, each.loaded.slab_bytes) for each in runners.values()}
    assert len(sizes) == 1
    assert {each.loaded.attention for each in runners.values()} >= {"xla"}
    fill(runners["deep"].driver, 3e4)
    for turn in range(3):
        for place, (name, runner) in enumerate(runners.items()):
            tasks = models.tasks(runner.loaded, (turn + place) % len(SHAPES))
            assert runner.run(*tasks) == alone[name]


def test_steps_of_models_take_turns_on_the_pool(
    runners: dict[str, Any], models: Models, alone: dict[str, list[list[int]]]
) -> None:
    tasks = [models.tasks(each.loaded, slab)[0] for slab, each in enumerate(runners.values())]
    done: list[list[Any]] = [[] for _ in runners]
    for runner, task, mine in zip(runners.values(), tasks, done, strict=True):
        mine += runner.steps(1, start=[runner.start(0, task)], chunks=[Chunk(0, 0, 0, len(task.known))])
    for _ in range(10):
        for runner, mine in zip(runners.values(), done, strict=True):
            mine += runner.steps(3, decode=[0])
    for runner in runners.values():
        runner.clear()
    assert [models.helpers.tokens_of(mine, 0) for mine in done] == [alone[name][0] for name in SHAPES]


def test_bfloat16_has_a_pool_of_its_own(runners: dict[str, Any], models: Models) -> None:
    driver, changes = runners["deep"].driver, {"kv_dtype": "bfloat16", "dtype": "bfloat16", "model": "halves"}
    runner = models.load(driver, "deep", **changes)
    assert (runner.loaded.pool, runners["deep"].loaded.pool) == ("bfloat16", "float32")
    assert runner.loaded.slab_bytes * (runner.loaded.slabs + 1) <= 24 << 20
    fill(driver, -1e4)
    assert runner.run(*models.tasks(runner.loaded, 1)) == models.alone("deep", **changes)
    check_programs(driver, "halves")
    driver.unload("halves")
    assert [each.name for each in driver._pools._pools.values()] == ["float32"]


def check_programs(driver: JaxDriver, name: str) -> None:
    """Programs of a model write the pool where it is."""
    (engine,) = driver._engines[name]
    array = engine.replica.caches.pool
    for key in [("decode", 4), ("prefill", 1, 64, False), ("gather", 1), ("scatter", 1), ("scrub",)]:
        program = engine.programs.get(key)
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < array.nbytes // 8, key
        assert key[0] == "gather" or memory.alias_size_in_bytes == array.nbytes


@pytest.mark.slow
def test_guesses_from_the_past_are_verified_in_a_pool(
    models: Models, alone: dict[str, list[list[int]]], driver: JaxDriver
) -> None:
    runner = models.load(driver, "small", speculation="ngram", speculation_tokens=3)
    fill(driver, 3e4)
    assert runner.run(*models.tasks(runner.loaded, 2)) == alone["small"]


def test_pages_leave_a_pool_as_they_leave_a_model_alone(
    runners: dict[str, Any],
    models: Models,
    driver: JaxDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A saved task may go on under a driver with another kind of arena, in either direction."""
    monkeypatch.setenv("LLMOS_STATE", str(tmp_path))
    own = models.load(driver, "deep", arena="own", pages=128)
    shared = models.load(runners["deep"].driver, "deep", host_pages=16, model="moved")
    task = models.tasks()[1]
    (whole,) = own.run(task)
    count = -(-len(task.known + whole) // 8)
    places = own.pages(0, 8 * count), [2 * shared.loaded.slab_pages + 2 * i for i in range(count)]
    for runner, held, target in [(own, places[0], shared), (shared, places[1], own)]:
        file: dict[int, bytes] = {}
        task.count, task.pages = 11, held
        (begun,) = runner.run(task)
        assert begun == whole[:11]
        keep = lambda index, data: file.update({index: bytes(data)})  # noqa: B023, E731
        runner.driver.save(runner.loaded.model, 0, held, keep)()()
        if target is shared:
            fill(shared.driver, 7.0)
        fresh = [5 + i for i in range(count)]
        target.driver.restore(target.loaded.model, 0, fresh, file.__getitem__)()()
        known = task.known + begun
        rest = models.helpers.Task(
            known, 19, len(task.known), cached=len(known) - 1, pages=fresh, sampling=SAMPLED
        )
        assert target.run(rest) == [whole[11:]]
    pairs = [(page, i) for i, page in enumerate(fresh)]
    back = [(i, 3 * shared.loaded.slab_pages + i) for i in range(count)]
    shared.driver.restore("moved", 0, fresh, file.__getitem__)()()
    shared.driver.move(Move(model="moved", source="device", target="host", pages=pairs, tenant="a"), KEY)()()
    fill(shared.driver, 7.0)
    shared.driver.move(Move(model="moved", source="host", target="device", pages=back, tenant="a"), KEY)()()
    rest.pages = [page for _, page in back]
    assert shared.run(rest) == [whole[11:]]
    shared.driver.unload("moved")


def test_what_a_failed_sequence_leaves_is_cleared_before_another_model_gets_its_pages(
    runners: dict[str, Any], models: Models
) -> None:
    first, second = runners["small"], runners["deep"]
    task = models.tasks(first.loaded, 0)[0]
    first.steps(1, start=[first.start(0, task)], chunks=[Chunk(0, 0, 0, len(task.known))])
    fill(first.driver, np.nan)
    (step,) = first.steps(1, decode=[0])
    assert step.finished == [(0, "error")]

    def held() -> np.ndarray:
        (shared,) = first.driver._pools._pools.values()
        pages = np.asarray(shared.array[0]).reshape(-1, first.loaded.page_bytes // 4)
        return pages[np.asarray(task.pages)]

    assert not np.isfinite(held()).all()
    second.steps(0)
    assert np.isfinite(held()).all()
    first.clear()
    fill(first.driver, 0.0)


def test_a_program_that_fails_takes_the_pool_with_it(models: Models, driver: JaxDriver) -> None:
    loaded = [models.load(driver, "small"), models.load(driver, "wide")]
    (shared,) = driver._pools._pools.values()
    shared.array.delete()
    for runner in loaded:
        task = models.tasks(runner.loaded, 0)[0]
        start = [runner.start(0, task)]
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            runner.steps(1, start=start, chunks=[Chunk(0, 0, 0, len(task.known))])


def test_the_last_model_to_go_frees_the_pool(models: Models, driver: JaxDriver, tmp_path: Path) -> None:
    models.load(driver, "small")
    with pytest.raises(InvalidArgument):
        models.load(driver, "deep", source=str(tmp_path))
    (shared,) = driver._pools._pools.values()
    assert shared.users == {"small"}
    models.load(driver, "wide")
    array = shared.array
    driver.unload("small")
    assert not array.is_deleted()
    driver.unload("wide")
    assert array.is_deleted()
    assert not driver._pools._pools


@pytest.mark.slow
def test_replicas_have_a_pool_on_each_device(
    models: Models, alone: dict[str, list[list[int]]], driver: JaxDriver
) -> None:
    single = models.load(driver, "small")
    runner = models.load(driver, "wide", mesh={"data": 2}, arena_bytes=1 << 30)
    assert (runner.loaded.replicas, runner.loaded.slabs) == (2, single.loaded.slabs)
    assert len({each.device for each in driver._pools._pools.values()}) == 2
    for replica in (0, 1):
        assert runner.run(*models.tasks(runner.loaded, 1), replica=replica) == alone["wide"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_dtype": "int8"}, "scales"),
        ({"mesh": {"tensor": 2}}, "cut over several devices"),
        ({"speculation": "draft", "draft": "other"}, "draft model"),
        ({"arena_bytes": -1}, "arena_bytes is -1"),
    ],
)
def test_what_cannot_share_is_refused(
    models: Models, driver: JaxDriver, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        models.load(driver, "small", **changes)
    assert driver._pools is None or not driver._pools._pools


def test_a_pool_must_hold_a_context_and_fit_the_device(
    models: Models, driver: JaxDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoMemory, match="arena_bytes"):
        models.load(driver, "deep", arena_bytes=1 << 16)
    monkeypatch.setattr(platform, "free_memory", lambda device: 4 << 20)
    with pytest.raises(NoMemory, match="smaller arena_bytes"):
        models.load(driver, "deep")
    assert not driver._pools._pools


def test_the_first_model_decides_the_size_of_the_pool() -> None:
    pools, device = pool.Pools(), jax.devices("cpu")[0]
    config = DecoderConfig(100, 64, 4, 4, 2, 16, 64, 1e-5, 1e4, 256)
    request = LoadRequest(model="a", source="", arena="shared", pages=100)
    first = sharing.join(pools, request, config, device, 0)
    assert 100 <= first.pages < 100 + first.geometry.slab_pages
    assert first.described()["slab_bytes"] == first.geometry.slab * 4
    again = msgspec.structs.replace(request, model="b", pages=0, arena_bytes=1 << 30)
    second = sharing.join(pools, again, replace(config, layers=7), device, 0)
    assert second.pool is first.pool
    assert second.geometry.slab_pages == second.geometry.slab // (2 * 7 * 2 * 16 * 16)
    assert second.pages == first.pool.sizes.slabs * second.geometry.slab_pages


def test_without_a_size_a_pool_takes_what_pages_of_a_model_alone_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = DecoderConfig(100, 64, 4, 4, 2, 16, 64, 1e-5, 1e4, 256)
    request = LoadRequest(model="a", source="", arena="shared", memory_fraction=0.5)
    monkeypatch.setattr(platform, "free_memory", lambda device: 300 << 20)
    member = sharing.join(pool.Pools(), request, config, jax.devices("cpu")[0], 50 << 20)
    assert 97 << 20 < member.pool.sizes.bytes(4) <= 100 << 20
    monkeypatch.setattr(platform, "free_memory", lambda device: 300 << 30)
    member = sharing.join(pool.Pools(), request, config, jax.devices("cpu")[0], 50 << 20)
    assert 490 << 20 < member.pool.sizes.bytes(4) <= sharing.HOST_CACHE_BYTES


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 28, 32, 40])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
def test_the_shapes_of_known_models_fit_into_slabs(kv_heads: int, head_dim: int) -> None:
    for page_tokens, itemsize, on_cpu in [(16, 4, True), (64, 2, False)]:
        block = (kv_heads, page_tokens, head_dim)
        slab = pool.SLAB_BYTES[on_cpu] // itemsize
        if kv_heads * head_dim % 9 and kv_heads * head_dim % 25 and kv_heads * head_dim % 49:
            assert (
                pool.plan(64 << 30, 32 * 2 * prod(block), prod(block), itemsize, on_cpu).slab % prod(block)
                == 0
            )
            assert slab % 105 == 0


@pytest.mark.parametrize("budget", [1 << 20, 50 << 20, 3 << 30, 100 << 30])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_pool_stays_within_its_budget_and_wastes_little(budget: int, page_tokens: int) -> None:
    block = 8 * page_tokens * 128
    sizes = pool.plan(budget, 2 * 32 * block, block, 2, on_cpu=False)
    assert sizes.slabs == 0 or sizes.bytes(2) <= budget
    made = Geometry(32, (8, page_tokens, 128), sizes.slab)
    assert made.slab_pages * made.page > 0.87 * made.slab
    assert budget < 1 << 30 or sizes.slabs >= 27


def test_a_model_whose_blocks_do_not_divide_a_slab_is_told_what_would() -> None:
    with pytest.raises(InvalidArgument, match="page_tokens = 32 would do"):
        pool.check(Geometry(2, (8, 64, 128), 105 << 15))
    with pytest.raises(InvalidArgument, match='pages of its own, or arena = "own"'):
        pool.check(Geometry(48, (25, 64, 64), 105 << 19))
    with pytest.raises(InvalidArgument, match="larger than a slab"):
        pool.check(Geometry(64, (8, 64, 128), 105 << 16))

"""Adapters on the device: several in a batch, loaded and dropped between steps, equal to merged weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from llmos.drivers.jax.adapters import lora
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.execution.spec import ADAPTED
from llmos.drivers.sdk.messages import Chunk, LoadAdapter, LoadedModel, LoadRequest, Start
from llmos.ipc.errors import Busy, InvalidArgument, NotFound
from tests.drivers.jax.lora_files import make_adapter, merged, write_adapter

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 9, 14, 3, 77, 20], [44, 2, 8], [61, 62, 63, 64, 65, 66, 67, 68, 69], [30, 31]]
COUNT = 6

Load = Callable[..., tuple[JaxDriver, LoadedModel]]


@pytest.fixture(scope="module")
def request_of(tiny_folder: Path, cache_folder: Path) -> LoadRequest:
    return LoadRequest(
        model="tiny", source=str(tiny_folder), cache=str(cache_folder), page_tokens=8, pages=256, slots=8,
        max_context=256, chunk_tokens=64, adapters=3, adapter_rank=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> dict[str, tuple[Path, Any, float]]:
    """Three adapters: of all modules, of some with less rank, and with a scale by the root of its rank."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, rank, modules, rooted) in enumerate(
        [("all", 8, MODULES, False), ("some", 4, ["q_proj", "v_proj", "down_proj"], False),
         ("rooted", 4, MODULES[:4], True)]
    ):  # fmt: skip
        tensors = make_adapter(helpers.TINY, rank, modules, seed)
        write_adapter(folder / name, tensors, rank, 8, modules, use_rslora=rooted)
        made[name] = (folder / name, tensors, 8 / (rank**0.5 if rooted else rank))
    return made


def load_adapter(driver: JaxDriver, name: str, source: Path) -> None:
    driver.load_adapter(LoadAdapter(model="tiny", adapter=name, source=str(source)))()()


def run(runner: Any, helpers: Any, names: list[str], prompts: list[list[int]], replica: int = 0) -> Any:
    """All prompts in one batch, each with its adapter."""
    starts, chunks = [], []
    for slot, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        start = runner.start(slot, helpers.Task(prompt, COUNT))
        starts.append(msgspec.structs.replace(start, adapter=name))
        chunks.append(Chunk(slot, slot, 0, len(prompt)))
    slots = list(range(len(names)))
    done = runner.steps(len(names) + COUNT, start=starts, chunks=chunks, decode=slots, replica=replica)
    runner.steps(1, release=slots, replica=replica)
    return [helpers.tokens_of(done, slot) for slot in slots]


@pytest.fixture(scope="module")
def loaded(request_of: LoadRequest, helpers: Any, adapters: Any) -> Any:
    driver = JaxDriver("cpu")
    runner = helpers.Runner(driver, driver.load(request_of, helpers.ignore))
    for name, (folder, *_) in adapters.items():
        load_adapter(driver, name, folder)
    yield runner
    driver.unload("tiny")


NAMES = ["all", "some", "", "rooted"]


def test_each_row_of_a_mixed_batch_is_as_with_weights_merged(
    loaded: Any, helpers: Any, adapters: Any, tiny_tensors: Any
) -> None:
    produced = run(loaded, helpers, NAMES, PROMPTS)
    for name, prompt, tokens in zip(NAMES, PROMPTS, produced, strict=True):
        _, tensors, scale = adapters[name] if name else (None, {}, 0.0)
        weights = merged(tiny_tensors, tensors, scale)
        assert tokens == helpers.dense_greedy(helpers.TINY, weights, prompt, COUNT), name


def test_a_mixed_batch_gives_each_what_it_gets_alone(loaded: Any, helpers: Any) -> None:
    alone = [run(loaded, helpers, [name], [prompt])[0] for name, prompt in zip(NAMES, PROMPTS, strict=True)]
    assert run(loaded, helpers, NAMES, PROMPTS) == alone
    assert (
        run(loaded, helpers, ["all", ""], [PROMPTS[0]] * 2)[0] != run(loaded, helpers, [""], PROMPTS[:1])[0]
    )


@pytest.fixture
def steps(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The keys of the forward programs that the model runs from now on."""
    ran: list[tuple[Any, ...]] = []
    programs = loaded.driver._engines["tiny"][0].programs
    get = programs.get

    def noting(key: tuple[Any, ...]) -> Any:
        if {"decode", "prefill"} & set(key):
            ran.append(key)
        return get(key)

    monkeypatch.setattr(programs, "get", noting)
    return ran


def instructions(text: str) -> list[str]:
    """Those of a compiled program, without the source lines they came from."""
    return [re.sub(r", metadata={[^}]*}", "", line) for line in text.splitlines() if " = " in line]


def test_without_an_adapter_in_it_a_batch_runs_the_programs_of_a_model_without_room(
    loaded: Any, helpers: Any, tiny_driver: tuple[JaxDriver, LoadedModel], steps: list[tuple[Any, ...]]
) -> None:
    plain = helpers.Runner(*tiny_driver)
    assert run(loaded, helpers, [""] * 4, PROMPTS) == run(plain, helpers, [""] * 4, PROMPTS)
    assert not any(key[0] == ADAPTED for key in steps)
    for key in {*steps}:
        roomy, without = (each.driver._engines["tiny"][0].programs.get(key) for each in (loaded, plain))
        assert instructions(roomy.as_text()) == instructions(without.as_text())


def test_only_the_steps_in_which_a_row_has_an_adapter_run_adapted_programs(
    loaded: Any, helpers: Any, steps: list[tuple[Any, ...]]
) -> None:
    starts = [loaded.start(slot, helpers.Task(PROMPTS[slot], COUNT)) for slot in range(2)]
    starts[0] = msgspec.structs.replace(starts[0], adapter="all")
    chunks = [Chunk(slot, slot, 0, len(PROMPTS[slot])) for slot in range(2)]
    loaded.steps(2, start=starts, chunks=chunks)
    assert [(key[0] == ADAPTED, "prefill" in key) for key in steps] == [(True, True), (False, True)]
    steps.clear()
    loaded.steps(1, decode=[0, 1])
    loaded.steps(1, decode=[1])
    loaded.steps(1, release=[0], decode=[1])
    assert [key[0] == ADAPTED for key in steps] == [True, False, False]
    loaded.steps(1, release=[1])


def test_rehearsing_adapted_programs_changes_nothing_and_waits_until_they_are_compiled(
    loaded: Any, helpers: Any
) -> None:
    before = run(loaded, helpers, NAMES, PROMPTS)
    engine = loaded.driver._engines["tiny"][0]
    engine.unrehearsed = engine.programs.spec.adapted()
    with engine.programs._adapting:
        assert not engine.rehearse()
    while engine.rehearse():
        pass
    assert engine.unrehearsed == []
    assert run(loaded, helpers, NAMES, PROMPTS) == before


def test_programs_with_adapters_are_compiled_when_the_first_is_loaded(
    request_of: LoadRequest, helpers: Any, adapters: Any, fresh_cache: Path
) -> None:
    driver = JaxDriver("cpu")
    wanted = msgspec.structs.replace(request_of, cache=str(fresh_cache))
    runner = helpers.Runner(driver, driver.load(wanted, helpers.ignore))
    programs = driver._engines["tiny"][0].programs
    assert not any(key[0] == ADAPTED for key in programs.ahead())
    first = [key for key in programs.spec.adapted() if key[1:] in programs.ahead()[: programs.spec.first]]
    before = run(runner, helpers, [""], PROMPTS[:1])
    assert first
    assert not any(programs.ready(key) for key in programs.spec.adapted())
    load_adapter(driver, "all", adapters["all"][0])
    assert all(programs.ready(key) for key in first)
    assert not programs.compile_adapted()
    assert run(runner, helpers, [""], PROMPTS[:1]) == before != run(runner, helpers, ["all"], PROMPTS[:1])
    driver.unload("tiny")


def test_the_ways_of_multiplying_without_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 3, 16)).astype(np.float32)
    y = rng.standard_normal((4, 3, 10)).astype(np.float32)
    a = rng.standard_normal((2, 2 * 4, 16)).astype(np.float32)
    b = rng.standard_normal((10, 2, 4)).astype(np.float32)
    rows = np.asarray([1, 0, 2, 1], np.int32)
    given = jnp.asarray(y), jnp.asarray(x), jnp.asarray(a), jnp.asarray(b)
    results = []
    for way in ("all", "own"):
        monkeypatch.setattr(lora, "choose", lambda *_, way=way: way)
        with lora.serving(jnp.asarray(rows)):
            results.append(lora.add(*given, (4, 6), lambda x, w: x @ w.T))
    expected = y.copy()
    for row, number in enumerate(rows):
        if number:
            inner = x[row] @ a[number - 1].T
            own = b[:, number - 1]
            expected[row] += np.concatenate([inner[:, :4] @ own[:4].T, inner[:, 4:] @ own[4:].T], axis=-1)
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_outside_of_serving_a_product_is_what_it_is() -> None:
    y = jnp.ones((2, 4))
    with lora.serving(None):
        assert lora.add(y, y, y, y, (4,), jnp.matmul) is y


def way(rows: int, tokens: int, adapters: int, platform: str, rank: int = 16, dtype: str = "float32") -> str:
    a, b = struct((adapters, 2 * rank, 64), dtype), struct((96, adapters, rank), dtype)
    return lora.choose(rows, tokens, a, b, (64, 32), platform)


def test_many_rows_of_one_token_read_each_adapter_once_and_prompts_copy_theirs() -> None:
    assert way(256, 1, 8, "tpu") == "all"
    assert way(256, 1, 32, "tpu") == "all"
    assert way(1, 1, 32, "tpu") == "own"
    assert way(4, 2048, 8, "tpu") == "own"
    assert way(32, 8, 8, "tpu") == "all"
    assert way(32, 1, 8, "cpu") == "all"


def test_a_gpu_has_kernels_for_bfloat16_and_ranks_that_it_can_multiply() -> None:
    assert way(256, 1, 8, "gpu", dtype="bfloat16") == way(1, 2048, 8, "cuda", dtype="bfloat16") == "grouped"
    assert way(256, 1, 8, "gpu") == "all"
    assert way(256, 1, 8, "gpu", rank=8, dtype="bfloat16") == "all"
    assert way(256, 1, 8, "gpu", rank=256, dtype="bfloat16") == "all"
    assert way(1 << 20, 32, 8, "gpu", dtype="bfloat16") != "grouped"  # it counts values in 32 bits
    ranks = [1, 8, 16, 24, 64, 128, 129]
    assert [lora.stored_rank(rank, "gpu") for rank in ranks] == [16, 16, 16, 32, 64, 128, 129]
    assert [lora.stored_rank(rank, "cpu") for rank in ranks] == ranks


def test_a_row_on_8_bit_weights_gets_the_same_whatever_is_beside_it(
    request_of: LoadRequest, helpers: Any, adapters: Any, fresh_cache: Path
) -> None:
    driver = JaxDriver("cpu")
    wanted = msgspec.structs.replace(request_of, cache=str(fresh_cache), weights="int8")
    runner = helpers.Runner(driver, driver.load(wanted, helpers.ignore))
    base = run(runner, helpers, [""] * 4, PROMPTS)
    for name, (folder, *_) in adapters.items():
        load_adapter(driver, name, folder)
    mixed = run(runner, helpers, NAMES, PROMPTS)
    assert mixed[2] == base[2]
    assert mixed[0] != base[0]
    assert run(runner, helpers, ["all", "rooted", "some", "all"], PROMPTS)[0] == mixed[0]
    driver.unload("tiny")


@pytest.mark.slow
def test_speculation_gives_the_tokens_of_plain_decoding(
    loaded: Any, request_of: LoadRequest, helpers: Any, adapters: Any, fresh_cache: Path
) -> None:
    driver = JaxDriver("cpu")
    wanted = msgspec.structs.replace(
        request_of, cache=str(fresh_cache), speculation="ngram", speculation_tokens=3
    )
    runner = helpers.Runner(driver, driver.load(wanted, helpers.ignore))
    for engine in driver._engines["tiny"]:
        engine.speculation.policy.always = True
    for name, (folder, *_) in adapters.items():
        load_adapter(driver, name, folder)
    repeating = [[7, 8, 9] * 5, [1, 2] * 6, [50, 51, 52, 53] * 3, [9] * 8]
    assert run(runner, helpers, NAMES, repeating) == run(loaded, helpers, NAMES, repeating)
    driver.unload("tiny")


@pytest.mark.slow
def test_every_replica_has_the_adapter(
    loaded: Any, request_of: LoadRequest, helpers: Any, adapters: Any, fresh_cache: Path
) -> None:
    driver = JaxDriver("cpu")
    wanted = msgspec.structs.replace(request_of, cache=str(fresh_cache), mesh={"data": 2})
    runner = helpers.Runner(driver, driver.load(wanted, helpers.ignore))
    load_adapter(driver, "all", adapters["all"][0])
    expected = run(loaded, helpers, ["all"], PROMPTS[:1])
    assert [run(runner, helpers, ["all"], PROMPTS[:1], replica=number) for number in range(2)] == [
        expected
    ] * 2
    driver.unload("tiny")


def test_an_adapter_comes_and_goes_while_others_run_and_nothing_is_compiled_for_it(
    loaded: Any, helpers: Any, adapters: Any
) -> None:
    driver = loaded.driver
    expected = run(loaded, helpers, ["some"], PROMPTS[:1])[0]
    engine = driver._engines["tiny"][0]
    while engine.programs._behind.is_alive():
        engine.programs._behind.join()
    run(loaded, helpers, ["some"], PROMPTS[:1])
    compiled = set(engine.programs._ready)
    start = msgspec.structs.replace(loaded.start(0, helpers.Task(PROMPTS[0], COUNT)), adapter="some")
    done = loaded.steps(2, start=[start], chunks=[Chunk(0, 0, 0, len(PROMPTS[0]))], decode=[0])
    with pytest.raises(Busy, match="unload one"):
        load_adapter(driver, "fourth", adapters["all"][0])
    driver.unload_adapter("tiny", "all")
    done += loaded.steps(2, decode=[0])
    load_adapter(driver, "again", adapters["all"][0])
    with pytest.raises(Busy, match="in use by 1"):
        driver.unload_adapter("tiny", "some")
    done += loaded.steps(4, decode=[0])
    loaded.steps(1, release=[0])
    assert helpers.tokens_of(done, 0) == expected
    assert set(engine.programs._ready) == compiled
    driver.unload_adapter("tiny", "again")
    load_adapter(driver, "all", adapters["all"][0])


def test_a_sequence_with_an_unknown_adapter_is_refused_before_any_effect(loaded: Any, helpers: Any) -> None:
    start: Start = loaded.start(0, helpers.Task(PROMPTS[0], COUNT))
    with pytest.raises(InvalidArgument, match="adapter gone is not loaded"):
        loaded.driver.execute(
            helpers.Quantum(
                id=99, model="tiny", steps=1, start=[msgspec.structs.replace(start, adapter="gone")]
            )
        )
    with pytest.raises(NotFound, match="not loaded here"):
        loaded.driver.unload_adapter("tiny", "gone")


def test_a_model_without_room_has_the_programs_it_always_had(
    tiny_driver: tuple[JaxDriver, LoadedModel], adapters: Any
) -> None:
    driver, _ = tiny_driver
    spec = driver._engines["tiny"][0].programs.spec
    assert (spec.room, spec.batch.adapter, spec.shape.adapters) == (None, None, False)
    assert ("adapt",) not in driver._engines["tiny"][0].programs.ahead()
    with pytest.raises(InvalidArgument, match="without room for adapters"):
        load_adapter(driver, "all", adapters["all"][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": -1}, "adapters is -1"),
        ({"adapter_rank": 0}, "adapter_rank is 0"),
        ({"mesh": {"tensor": 2}}, "cut over several devices has no adapters"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    fields: dict[str, Any], message: str, request_of: LoadRequest, helpers: Any
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        JaxDriver("cpu").load(msgspec.structs.replace(request_of, **fields), helpers.ignore)

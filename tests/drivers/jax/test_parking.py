"""A parked model keeps its weights and nothing else, and goes on exactly as before when it is awake again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from llmos.drivers.jax import parking, platform
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.parking import Parked
from llmos.drivers.jax.platform import lacking
from llmos.drivers.sdk.messages import EncodeStep, LoadRequest, Moved, Sampling
from llmos.ipc.errors import NoMemory, NotFound

FAMILIES = Path(__file__).parents[2] / "data" / "families"
PROMPT = [5, 9, 77, 31, 8] * 6
WARM = Sampling(temperature=0.7, seed=5, repetition_penalty=1.2)


def park(driver: JaxDriver, model: str) -> Moved:
    return driver.park(model)()()


def wake(driver: JaxDriver, model: str) -> Moved:
    return driver.wake(model)()()


@pytest.fixture(params=[False, True], ids=["in place", "to host memory"])
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether weights leave the device: CPU devices have memory of that kind too."""
    monkeypatch.setattr(
        parking, "Parked", lambda replicas, device: Parked(replicas, device, host=request.param)
    )
    return bool(request.param)


@pytest.fixture(scope="module")
def driver() -> Iterator[JaxDriver]:
    made = JaxDriver("cpu")
    yield made
    for model in [*made._engines, *made._encoders]:
        made.unload(model)


@pytest.fixture(scope="module")
def load(driver: JaxDriver, tiny_folder: Path, cache_folder: Path, helpers: Any) -> Callable[..., Any]:
    """Loads a model once for all tests; each leaves it awake and with empty slots."""
    runners: dict[str, Any] = {}

    def make(model: str = "m", **fields: Any) -> Any:
        if model not in runners:
            values: dict[str, Any] = {
                "page_tokens": 8,
                "pages": 64,
                "slots": 2,
                "max_context": 128,
                "chunk_tokens": 64,
            }
            values |= {"source": str(tiny_folder), "cache": str(cache_folder)}
            loaded = driver.load(LoadRequest(**(values | fields | {"model": model})), helpers.ignore)
            runners[model] = helpers.Runner(driver, loaded)
        return runners[model]

    return make


def test_the_tokens_after_waking_are_those_before(load: Any, helpers: Any, away: bool) -> None:
    runner = load()
    tasks = [helpers.Task(PROMPT, 20), helpers.Task([7, 7, 9], 20, sampling=WARM)]
    before = runner.run(*tasks)
    for _ in range(2):
        moved = park(runner.driver, "m")
        assert (moved.bytes > 0) == away
        wake(runner.driver, "m")
        assert runner.run(*tasks) == before


def test_a_parked_model_has_nothing_on_its_device(load: Any, helpers: Any, away: bool) -> None:
    runner = load()
    runner.run(helpers.Task(PROMPT, 5, sampling=WARM))
    replica = runner.driver._engines["m"][0].replica
    weights, state = replica.weights, replica.state
    assert sum(x.nbytes for x in state) >= runner.loaded.pages * runner.loaded.page_bytes
    park(runner.driver, "m")
    assert all(x.is_deleted() for x in state)
    assert all(x.is_deleted() == away for x in weights)
    kinds = {x.sharding.memory_kind for x in replica.weights}
    assert kinds == ({"pinned_host"} if away else {"device"})
    assert not runner.driver.idle()
    wake(runner.driver, "m")


def test_waking_reads_and_compiles_nothing(
    load: Any, helpers: Any, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, seen = load(), []
    runner.run(helpers.Task(PROMPT, 5))
    runner.driver._engines["m"][0].programs._behind.join()  # it compiles what nobody waits for
    park(runner.driver, "m")
    wake(runner.driver, "m")  # the first of them may compile the copies themselves
    runner.run(helpers.Task(PROMPT, 5))
    park(runner.driver, "m")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was opened"))
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: seen.append(event))
    try:
        wake(runner.driver, "m")
        runner.run(helpers.Task(PROMPT, 5))
    finally:
        jax.monitoring.clear_event_listeners()
    assert [name for name in seen if "compile" in name] == []


def test_a_model_with_a_draft_model_is_parked_with_it(
    load: Any, helpers: Any, away: bool, tiny_folder: Path
) -> None:
    runner = load("drafted", speculation="draft", speculation_tokens=3, draft=str(tiny_folder))
    (engine,) = runner.driver._engines["drafted"]
    engine.speculation.policy.always = True
    before = runner.run(helpers.Task(PROMPT, 20))
    park(runner.driver, "drafted")
    wake(runner.driver, "drafted")
    assert runner.run(helpers.Task(PROMPT, 20)) == before


def test_another_model_generates_undisturbed(load: Any, helpers: Any, away: bool) -> None:
    runner, other = load(), load("other")
    (expected,) = other.run(helpers.Task(PROMPT, 12))
    start = other.start(0, helpers.Task(PROMPT, 12))
    done = other.steps(1, start=[start], chunks=[helpers.Chunk(0, 0, 0, len(PROMPT))])
    for act in (park, wake, park):
        done += other.steps(3, decode=[0])
        act(runner.driver, "m")
    done += other.steps(9, decode=[0])
    assert helpers.tokens_of(done, 0) == expected
    other.clear()
    wake(runner.driver, "m")


def test_an_encoder_is_parked_too(driver: JaxDriver, helpers: Any, away: bool) -> None:
    request = LoadRequest(model="e", source=f"random:{FAMILIES / 'bert' / 'config.json'}")
    if "e" not in driver._encoders:
        driver.load(request, helpers.ignore)
    before = driver.encode(EncodeStep(model="e", texts=[[1, 2, 3]]))().rows
    park(driver, "e")
    wake(driver, "e")
    assert driver.encode(EncodeStep(model="e", texts=[[1, 2, 3]]))().rows == before


def test_where_memory_lacks_a_model_stays_parked(
    load: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load()
    before = runner.run(helpers.Task(PROMPT, 8))
    replicas = [engine.replica for engine in runner.driver._engines["m"]]
    parked = Parked(replicas, SimpleNamespace(platform="gpu"), host=True)
    parked.park()()()
    monkeypatch.setattr(platform, "free_memory", lambda device: 1000)
    with pytest.raises(NoMemory, match="has 1000 left"):
        parked.wake()()
    monkeypatch.setattr(platform, "free_memory", lambda device: 1 << 30)
    parked.wake()()()
    assert runner.run(helpers.Task(PROMPT, 8)) == before


def test_a_wake_that_fails_halfway_leaves_nothing_on_the_device(
    load: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, made = load(), []
    before = runner.run(helpers.Task(PROMPT, 8))
    replicas = [engine.replica for engine in runner.driver._engines["m"]]
    parked = Parked(replicas, runner.driver._devices()[0], host=True)
    parked.park()()()

    def full() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate")

    carry = parking._carry

    def noted(*arguments: Any) -> Any:
        found = carry(*arguments)
        made.extend(found)
        return found

    monkeypatch.setattr(parking, "_carry", noted)
    with monkeypatch.context() as broken:
        broken.setattr(replicas[0], "renew", full)
        with pytest.raises(NoMemory, match="has not got the memory to wake"):
            parked.wake()()
    assert len(made) == len(replicas[0].weights)
    assert all(x.is_deleted() for x in made)
    parked.wake()()()
    assert runner.run(helpers.Task(PROMPT, 8)) == before


def test_what_xla_says_of_memory_is_told_as_such() -> None:
    with pytest.raises(NoMemory, match="no room: RESOURCE_EXHAUSTED"), lacking("no room"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of it\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError), lacking("no room"):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")


def test_a_model_that_is_not_there_is_not_parked(driver: JaxDriver) -> None:
    for act in (park, wake):
        with pytest.raises(NotFound):
            act(driver, "nobody")


def test_weights_travel_in_their_own_layout() -> None:
    value = np.arange(12, dtype=np.int8).reshape(3, 4)
    store = parking.HostMemory()
    near = [jax.device_put(value), jax.device_put(value.astype(np.float32))]
    for x, y in zip(store.back(store.out(near, []), []), near, strict=True):
        assert (x.sharding, x.dtype) == (y.sharding, y.dtype)
        np.testing.assert_array_equal(x, y)


def test_a_pool_stays_where_it_is_when_one_of_its_models_is_parked(
    load: Any, helpers: Any, away: bool
) -> None:
    one, other = (load(name, arena="shared", arena_bytes=64 << 20) for name in ("pooled", "beside"))
    tasks = [helpers.Task(PROMPT, 12)]
    before = one.run(*tasks)
    park(one.driver, "pooled")
    assert other.run(*tasks) == before
    wake(one.driver, "pooled")
    assert one.run(*tasks) == before

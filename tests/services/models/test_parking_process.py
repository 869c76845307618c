"""Parking through real processes, under the rights of boot.toml: whatever is parked, killed or short of
memory, requests are answered as if nothing had been."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.null.driver import next_token
from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, NoMemory, NotFound, TimedOut
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.memory.messages import Usage
from llmos.services.models.messages import ModelLine, ModelList, Park, Unload, Wake
from llmos.services.scheduler.messages import Cont, Finished, Pause, SchedulerStats, Submit, Tasks, Tokens
from llmos.services.supervisor.grants import boot_grants, read_rights
from tests.conftest import System, wait_until
from tests.services.models.gguf_file import METADATA, write_gguf

PROMPT = [1, 2, 3, 4, 5, 6]
STEP_MS = 5.0
PARK_MS = 300.0


def expected(count: int, prompt: list[int] = PROMPT) -> list[int]:
    """What the null driver generates after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Bench:
    """Models a, b and c on one driver, with room for ``room`` of them."""

    def __init__(self, system: System, manifest: Manifest) -> None:
        self.system = system
        self.models = manifest.models
        system.write_manifest(manifest)
        system.kernel()
        for name in ("memory", "scheduler", "models", "driver.null0"):
            self.start(name)
        system.wait_ready("memory", "scheduler", "models", "driver.null0")
        self.user = system.client()
        self._pool = ThreadPoolExecutor(8)

    def start(self, name: str) -> None:
        module = ["llmos.drivers.sdk", "null0"] if name.startswith("driver.") else [f"llmos.services.{name}"]
        self.system.spawn(name, *module)

    def kill(self, name: str) -> None:
        process = self.system.processes.pop(name)
        process.kill()
        process.wait()

    def line(self, model: str = "a") -> ModelLine:
        lines = self.user.call("models.list", None, ModelList).models
        return next(line for line in lines if line.name == model)

    def wait(self, state: str, model: str = "a") -> None:
        wait_until(lambda: self.line(model).state == state, what=f"{model} {state}")

    def wait_loaded(self) -> None:
        wait_until(
            lambda: all(self.line(spec.name).state != "loading" for spec in self.models), what="models"
        )

    def park(self, model: str = "a", timeout: float = 20.0) -> ModelLine:
        return self.user.call("models.park", Park(model), ModelLine, timeout=timeout)

    def wake(self, model: str = "a") -> ModelLine:
        return self.user.call("models.wake", Wake(model), ModelLine)

    def generate(
        self, count: int = 8, model: str = "a", client: Client | None = None, **more: Any
    ) -> list[int]:
        """The tokens of a task that is submitted to the scheduler itself."""
        found: list[int] = []
        body = Submit(model=model, tokens=PROMPT, max_tokens=count)
        for answer in (client or self.user).stream("scheduler.submit", body, Tokens, end=Finished, **more):
            if isinstance(answer, Tokens):
                assert answer.offset == len(found), "no token is lost or sent twice"
                found += answer.tokens
        return found

    def beside(self, count: int = 8, model: str = "a", **more: Any) -> Future[list[int]]:
        """The same, on a client of its own."""
        client = self.system.client()
        return self._pool.submit(lambda: self.generate(count, model, client, **more))

    def running(self, model: str = "a") -> bool:
        tasks = self.user.call("scheduler.tasks", None, Tasks).tasks
        return any(task.model == model and task.completion_tokens for task in tasks)

    def close(self) -> None:
        self._pool.shutdown()
        self.system.close()
        shutil.rmtree(self.system.run, ignore_errors=True)


def boot(parks: tuple[str, ...], room: int, park_ms: float, names: str = "abc") -> Bench:
    """A system with a model for each way to be parked; e is an encoder."""
    options: dict[str, Any] = {"step_ms": STEP_MS, "park_ms": park_ms, "room": room, "encoder": "e"}
    driver = DriverSpec(name="null0", kind="null", options=options)
    rights = boot_grants(Manifest(drivers=[driver], models=[]), read_rights())
    rights["poor"] = Grant(principal="poor", tenant="p", models=["b"], calls=["models.park", "models.wake"])
    one = System(Path(tempfile.mkdtemp(prefix="llmos-t")), rights)
    source = str(write_gguf(one.run / "m.gguf", {**METADATA, "tokenizer.ggml.eos_token_id": 255}))
    models = [
        ModelSpec(name=name, driver="null0", source=source, park=park, page_tokens=4, slots=2, pages=64)
        for name, park in zip(names, parks, strict=False)
    ]
    return Bench(one, Manifest(drivers=[driver], models=models))


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*parks: str, room: int = 0, park_ms: float = 50.0) -> Bench:
        made.append(boot(parks, room, park_ms))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    """Three models that are parked by hand only, and nothing is killed."""
    one = boot(("never",) * 3, 0, PARK_MS, "abe")
    yield one
    one.close()


@pytest.fixture
def one(shared: Bench) -> Bench:
    """The shared system with all its models awake."""
    for name in "abe":
        shared.wake(name)
    return shared


def test_a_request_for_a_parked_model_wakes_it_and_is_answered_as_ever(one: Bench) -> None:
    assert one.generate() == expected(8)
    assert one.park().state == "parked"
    arenas = one.user.call("memory.usage", None, Usage).arenas
    assert [arena.arena for arena in arenas] == ["null0/b"], "its pages are given back"
    assert {host.model for host in one.user.call("scheduler.stats", None, SchedulerStats).hosts} == {"b", "e"}
    assert one.generate() == expected(8)
    line = one.line()
    assert (line.state, line.woke >= 0.3) == ("ready", True)
    assert one.park().state == "parked"
    assert one.park().state == "parked", "parking it again does nothing"
    chat = {"model": "a", "prompt": PROMPT, "generation": {"max_tokens": 4, "ignore_eos": True}}
    *_, done = one.user.stream("models.complete", chat)
    assert done["usage"]["completion_tokens"] == 4


def test_waking_by_hand_waits_until_it_is_there(one: Bench) -> None:
    assert one.wake().state == "ready", "one that is awake stays so"
    one.park()
    line = one.wake()
    assert (line.state, line.woke >= 0.3) == ("ready", True)
    assert one.generate() == expected(8)


def test_an_encoder_is_parked_and_woken_too(one: Bench) -> None:
    embed = {"model": "e", "input": [[7, 8], [9]]}
    before = one.user.call("models.embed", embed)
    one.park("e")
    assert one.user.call("models.embed", embed) == before


def test_many_requests_cause_one_wake(one: Bench) -> None:
    one.park()
    answers = [one.beside() for _ in range(6)]
    assert [answer.result(20) for answer in answers] == [expected(8)] * 6
    assert 0.3 <= one.line().woke < 0.6, "two would have taken twice as long"


def test_a_request_waits_no_longer_than_its_deadline(one: Bench) -> None:
    one.park()
    with pytest.raises(TimedOut):
        one.generate(timeout=0.2)
    one.wait("ready")
    assert one.generate() == expected(8)


def test_parking_waits_for_the_tasks_there_are(one: Bench) -> None:
    long = one.beside(200)
    wait_until(lambda: one.running(), what="a task")
    with pytest.raises(TimedOut):
        one.park(timeout=0.3)
    assert one.park().state == "parked"
    assert long.result(0.5) == expected(200)


def test_a_request_that_comes_while_a_model_is_being_parked_is_answered(one: Bench) -> None:
    client = one.system.client()
    parking = threading.Thread(target=lambda: client.call("models.park", Park("a"), ModelLine))
    parking.start()
    one.wait("parked")
    assert one.generate() == expected(8)
    parking.join()
    assert one.line().state == "ready"


def test_a_stream_of_another_model_goes_on_while_one_is_parked_and_woken(one: Bench) -> None:
    stream = one.beside(240, "b")
    wait_until(lambda: one.running("b"), what="a task")
    one.park()
    one.wake()
    assert not stream.done()
    assert stream.result(20) == expected(240)


def test_a_stopped_task_keeps_no_model_awake_and_goes_on_when_it_is_continued(one: Bench) -> None:
    answer = one.beside(100)
    wait_until(lambda: one.running(), what="a task")
    (task,) = one.user.call("scheduler.tasks", None, Tasks).tasks
    one.user.call("scheduler.pause", Pause(task.task))
    assert one.park().state == "parked"
    one.user.call("scheduler.cont", Cont(task.task))
    assert answer.result(20) == expected(100)


def test_an_idle_model_is_parked_after_its_time_and_a_busy_one_is_not(bench: Callable[..., Bench]) -> None:
    one = bench("0.4s", "never")
    one.wait("ready")
    one.wait("parked")
    assert one.generate(160) == expected(160), "it takes twice as long"
    assert one.line().state == "ready"
    one.wait("parked")
    assert one.line("b").state == "ready"


def test_models_take_turns_where_there_is_room_for_one(bench: Callable[..., Bench]) -> None:
    one = bench("pressure", "pressure", "10m", room=1)
    one.wait_loaded()
    for model in ("a", "b", "c", "a", "c", "b"):
        assert one.generate(4, model, timeout=20) == expected(4)
        assert one.line(model).state == "ready"
    assert sorted(one.line(model).state for model in "abc") == ["parked", "parked", "ready"]
    answers = [one.beside(20, "abc"[i % 3]) for i in range(9)]
    assert [answer.result(30) for answer in answers] == [expected(20)] * 9


def test_who_was_idle_for_longest_leaves_first(bench: Callable[..., Bench]) -> None:
    one = bench("pressure", "pressure", "pressure", room=2)
    one.wait_loaded()
    one.generate(1, "b")
    one.generate(1, "c")
    one.generate(1, "a")
    assert [one.line(model).state for model in "abc"] == ["ready", "parked", "ready"]


def test_a_request_waits_for_a_model_in_use_to_become_idle(bench: Callable[..., Bench]) -> None:
    one = bench("pressure", "pressure", room=1)
    one.wait("ready", "b")
    long = one.beside(150, "b")
    wait_until(lambda: one.running("b"), what="a task")
    assert one.generate(4) == expected(4)
    assert long.done()
    assert long.result() == expected(150)


def test_where_nobody_may_leave_requests_are_told_so_and_the_model_stays_parked(
    bench: Callable[..., Bench],
) -> None:
    one = bench("never", "never", room=1)
    one.wait("ready")
    one.wait("failed", "b")
    assert "ENOMEM" in one.line("b").error
    one.park()
    one.user.call("models.unload", Unload("b"))
    *_, end = one.user.stream("models.load", {"model": "b"})
    assert end["state"] == "ready"
    with pytest.raises(NoMemory, match=r"cannot be woken.*park or unload one"):
        one.generate()
    with pytest.raises(NoMemory):
        one.wake()
    assert one.line().state == "parked"
    one.park("b")
    assert one.generate() == expected(8)


@pytest.mark.parametrize("state", ["parked", "waking"])
def test_a_driver_that_is_killed_has_its_models_loaded_again(bench: Callable[..., Bench], state: str) -> None:
    one = bench("never", "never", park_ms=2000.0 if state == "waking" else 50.0)
    one.wait("ready")
    one.park()
    answer = None
    if state == "waking":
        answer = one.beside()
        one.wait("waking")
    one.kill("driver.null0")
    one.wait("loading")
    one.start("driver.null0")
    assert one.generate() == expected(8)
    assert answer is None or answer.result(20) == expected(8)
    assert one.line().state == "ready"


@pytest.mark.parametrize("name", ["models", "scheduler", "memory"])
def test_a_model_stays_parked_when_a_service_is_killed(bench: Callable[..., Bench], name: str) -> None:
    one = bench("never", "never")
    one.wait("ready")
    one.park()
    one.kill(name)
    one.start(name)
    one.system.wait_ready(name)
    one.wait("parked")
    one.wait("ready", "b")
    assert one.generate(4, "b") == expected(4)
    assert one.generate() == expected(8)


def test_a_task_that_came_while_the_models_service_was_dead_wakes_the_model(
    bench: Callable[..., Bench],
) -> None:
    one = bench("never")
    one.wait("ready")
    one.park()
    one.kill("models")
    answer = one.beside()
    wait_until(lambda: bool(one.user.call("scheduler.tasks", None, Tasks).tasks), what="a task")
    one.start("models")
    assert answer.result(20) == expected(8)


def test_a_parked_model_can_be_unloaded_and_loaded(one: Bench) -> None:
    one.park()
    one.user.call("models.unload", Unload("a"))
    assert one.line().state == "unloaded"
    for act in (one.park, one.wake):
        with pytest.raises(NotFound, match="llmos load a"):
            act()
    *_, end = one.user.stream("models.load", {"model": "a"})
    assert end["state"] == "ready"
    one.park()
    *_, end = one.user.stream("models.load", {"model": "a"})
    assert end["state"] == "ready", "loading wakes it"
    assert one.generate() == expected(8)


def test_only_who_may_use_a_model_may_park_it(one: Bench) -> None:
    poor = one.system.client("poor")
    for verb, body in (("park", Park("a")), ("wake", Wake("a"))):
        with pytest.raises(AccessDenied):
            poor.call(f"models.{verb}", body)
    with pytest.raises(AccessDenied):
        poor.call("models.unload", Unload("b"))
    with pytest.raises(NotFound):
        one.park("nobody")

"""Adapters through the system: real models, scheduler, memory and security, and the null driver, whose tokens
depend on the adapter and whose pages know which one they were computed with."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.null.driver import next_token
from llmos.ipc.client import Client
from llmos.ipc.errors import (
    AccessDenied,
    Busy,
    Canceled,
    InvalidArgument,
    IOFailure,
    NotFound,
)
from llmos.ipc.grant import Grant
from llmos.services import adapters
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.models.fingerprint import fingerprint
from llmos.services.models.messages import (
    Complete,
    Done,
    Generation,
    LoadAdapter,
    ModelLine,
    ModelList,
    Resume,
    Text,
    UnloadAdapter,
)
from llmos.services.scheduler.messages import Kill, Save, Saved, Submit, Tasks, Tokens
from tests.conftest import System, wait_until
from tests.services.models.gguf_file import METADATA, write_gguf

CALLS = ["models.*", "scheduler.*", "memory.usage", "kernel.names"]
PROMPT = list(range(10, 50))
GRANTS = {
    "security": Grant(principal="security", tenant="system", serves="security", calls=["kernel.revoke"]),
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", "driver.d0.*"]
    ),
    "models": Grant(
        principal="models", tenant="system", serves="models", calls=["scheduler.*", "driver.d0.*"]
    ),
    "driver.d0": Grant(
        principal="d0", tenant="system", serves="driver.d0", calls=["security.storage_key"]
    ),
    "user": Grant(principal="user", tenant="a", models=["*"], calls=CALLS, band="realtime"),
    "base": Grant(principal="base", tenant="a", models=["tiny"], calls=CALLS),
    "one": Grant(principal="one", tenant="a", models=["tiny:one"], calls=CALLS),
}  # fmt: skip


class World(System):
    """A model with room for three adapters, one of which the manifest names."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="llmos-t")), GRANTS)
        source = self.run / "tiny.gguf"
        write_gguf(source, METADATA)
        spec = ModelSpec(
            name="tiny", driver="d0", source=str(source), slots=4, pages=256, page_tokens=4, max_context=240,
            adapters={"one": str(self.adapter("one"))}, max_adapters=3,
        )  # fmt: skip
        driver = DriverSpec(name="d0", kind="null", options={"step_ms": 2.0})
        self.write_manifest(Manifest(drivers=[driver], models=[spec]))
        self.kernel()
        for name in ("security", "memory", "scheduler", "models"):
            self.spawn(name, f"llmos.services.{name}")
        self.start_driver()
        self.wait_ready("models")
        self.user = self.client()
        wait_until(self.ready, what="the model")

    def start_driver(self) -> None:
        self.spawn("driver.d0", "llmos.drivers.sdk", "d0")

    def kill_driver(self) -> None:
        process = self.processes.pop("driver.d0")
        process.kill()
        process.wait()
        self.start_driver()

    def ready(self) -> bool:
        return self.states().get("tiny") == "ready"

    def states(self) -> dict[str, str]:
        lines = self.user.call("models.list", None, ModelList).models
        return {line.name: line.state for line in lines}

    def adapter(self, name: str, content: str = "") -> Path:
        folder = self.run / "adapters" / (name + content)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(f'{{"r": 1, "is": "{name}{content}"}}')
        return folder

    def load(self, name: str, content: str = "") -> ModelLine:
        source = str(self.adapter(name, content))
        return self.user.call("models.load_adapter", LoadAdapter(f"tiny:{name}", source), ModelLine)

    def unload(self, name: str) -> None:
        self.user.call("models.unload_adapter", UnloadAdapter(f"tiny:{name}"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()
    shutil.rmtree(world.run, ignore_errors=True)


def asked(model: str, count: int = 20, prompt: list[int] | None = None) -> Complete:
    generation = Generation(max_tokens=count, temperature=0.0, ignore_eos=True)
    return Complete(model=model, prompt=prompt or PROMPT, generation=generation)


def ask(client: Client, model: str, count: int = 20, prompt: list[int] | None = None) -> Done:
    *_, end = client.stream("models.complete", asked(model, count, prompt), Text, Done)
    assert isinstance(end, Done)
    return end


def identity(world: World, name: str) -> str:
    """What an adapter is called inside, as a task that has it tells."""
    return adapters.identity(name, fingerprint(world.adapter(name), "lora"))


def test_an_adapter_is_a_model_of_its_own_name(world: World) -> None:
    assert world.states() == {"tiny": "ready", "tiny:one": "ready"}
    lines = {line.name: line for line in world.user.call("models.list", None, ModelList).models}
    assert lines["tiny:one"].parent == "tiny"
    plain, adapted = ask(world.user, "tiny"), ask(world.user, "tiny:one")
    assert plain.text != adapted.text
    assert adapted.text == ask(world.user, "tiny:one").text


def test_the_driver_generates_with_the_adapter_named(world: World) -> None:
    submit = Submit(model="tiny", tokens=PROMPT, max_tokens=8, adapter=identity(world, "one"))
    chunks = [m for m in world.user.stream("scheduler.submit", submit, Tokens) if isinstance(m, Tokens)]
    tokens = list(PROMPT)
    for _ in range(8):
        tokens.append(next_token(tokens, submit.adapter))
    assert [token for chunk in chunks for token in chunk.tokens] == tokens[len(PROMPT) :]


def test_a_prefix_is_found_under_the_same_adapter_only(world: World) -> None:
    prompt = list(range(60, 100))
    assert ask(world.user, "tiny:one", prompt=prompt).usage.cached_tokens == 0
    assert ask(world.user, "tiny", prompt=prompt).usage.cached_tokens == 0
    assert ask(world.user, "tiny:one", prompt=prompt).usage.cached_tokens >= 36
    assert ask(world.user, "tiny", prompt=prompt).usage.cached_tokens >= 36
    world.load("two")
    assert ask(world.user, "tiny:two", prompt=prompt).usage.cached_tokens == 0
    world.unload("two")
    world.load("two", "changed")
    assert ask(world.user, "tiny:two", prompt=prompt).usage.cached_tokens == 0
    world.unload("two")


def test_a_grant_names_the_adapter_or_does_not_allow_it(world: World) -> None:
    base, one = world.client("base"), world.client("one")
    with pytest.raises(AccessDenied, match="tiny:one"):
        ask(base, "tiny:one")
    with pytest.raises(AccessDenied, match="'tiny'"):
        ask(one, "tiny")
    submit = Submit(model="tiny", tokens=PROMPT, max_tokens=8, adapter=identity(world, "one"))
    with pytest.raises(AccessDenied):
        list(base.stream("scheduler.submit", submit, Tokens))
    for method, body in [("load", LoadAdapter("tiny:one", "/x")), ("unload", UnloadAdapter("tiny:one"))]:
        with pytest.raises(AccessDenied):
            base.call(f"models.{method}_adapter", body)
    assert ask(one, "tiny:one").text == ask(world.user, "tiny:one").text
    assert [line.name for line in one.call("models.list", None, ModelList).models] == ["tiny:one"]
    assert [line.name for line in base.call("models.list", None, ModelList).models] == ["tiny"]


def test_one_comes_and_goes_while_a_stream_runs(world: World) -> None:
    expected = ask(world.user, "tiny:one", 150).text
    stream = world.client().stream("models.complete", asked("tiny:one", 150), Text, Done)
    next(stream)
    with pytest.raises(NotFound, match="no adapter 'late'"):
        ask(world.user, "tiny:late")
    assert world.load("late").state == "ready"
    first = ask(world.user, "tiny:late").text
    with pytest.raises(Busy, match="wait until they end"):
        world.unload("one")
    world.unload("late")
    with pytest.raises(NotFound):
        ask(world.user, "tiny:late")
    world.load("late", "changed")
    assert ask(world.user, "tiny:late").text != first
    world.unload("late")
    *_, end = stream
    assert isinstance(end, Done)
    assert end.text == expected


def test_what_is_wrong_is_said(world: World, tmp_path: Path) -> None:
    load: Callable[..., Any] = lambda model, path: world.user.call(  # noqa: E731
        "models.load_adapter", LoadAdapter(model, str(path)), ModelLine
    )
    with pytest.raises(NotFound, match="no adapter at"):
        load("tiny:bad", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="has no adapter_config"):
        load("tiny:bad", tmp_path / "empty")
    with pytest.raises(InvalidArgument, match="use up to 64 letters"):
        load("tiny:b d", tmp_path)
    with pytest.raises(InvalidArgument, match="say where"):
        world.user.call("models.load_adapter", LoadAdapter("tiny:new"), ModelLine)
    with pytest.raises(NotFound, match="no model 'huge'"):
        load("huge:bad", tmp_path)
    stream = world.client().stream("models.complete", asked("tiny:one", 150), Text, Done)
    next(stream)
    with pytest.raises(Busy, match="wait until"):
        world.load("one", "changed")
    stream.close()
    for content in ("", "changed", "again", ""):
        world.load("two", content)  # the weights that had this name before make room
    world.load("three")
    with pytest.raises(Busy, match="all 3 adapters"):
        world.load("four")
    world.unload("two")
    world.unload("three")
    assert world.states() == {"tiny": "ready", "tiny:one": "ready"}


def test_a_killed_task_does_not_keep_its_adapter(world: World) -> None:
    world.load("two")
    stream = world.client().stream("models.complete", asked("tiny:two", 180), Text, Done)
    next(stream)
    (line,) = world.user.call("scheduler.tasks", None, Tasks).tasks
    assert line.model == "tiny:two"
    world.user.call("scheduler.kill", Kill(line.task))
    world.unload("two")
    with pytest.raises(Canceled):
        list(stream)


def test_a_saved_task_goes_on_with_its_adapter_or_not_at_all(world: World) -> None:
    expected = ask(world.user, "tiny:one", 150).text
    world.load("two")
    texts = {}
    for name in ("one", "two"):
        stream = world.client().stream("models.complete", asked(f"tiny:{name}", 150), Text, Done)
        next(stream)
        (line,) = world.user.call("scheduler.tasks", None, Tasks).tasks
        texts[name] = world.user.call("scheduler.save", Save(line.task), Saved).name
        with pytest.raises(Canceled):
            list(stream)
    *_, end = world.user.stream("models.resume", Resume(texts["one"]), Text, Done)
    assert isinstance(end, Done)
    assert end.text == expected
    with pytest.raises(AccessDenied, match="tiny:one"):
        list(world.client("base").stream("models.resume", Resume(texts["one"]), Text, Done))
    world.unload("two")
    with pytest.raises(InvalidArgument, match="llmos load tiny:two PATH"):
        list(world.user.stream("models.resume", Resume(texts["two"]), Text, Done))
    world.load("two", "changed")
    with pytest.raises(InvalidArgument, match="not here with these weights"):
        list(world.user.stream("models.resume", Resume(texts["two"]), Text, Done))
    world.unload("two")


def test_after_a_driver_is_killed_streams_go_on_with_their_adapters(world: World) -> None:
    """Those of the manifest and those loaded since are loaded again; one that is gone ends its tasks."""
    world.load("two")
    world.load("lost")
    expected = {name: ask(world.user, f"tiny:{name}", 150).text for name in ("one", "two")}
    said: dict[str, str] = {}
    failed: list[Exception] = []

    def read(name: str) -> None:
        try:
            said[name] = ask(world.client(), f"tiny:{name}", 150).text
        except (IOFailure, NotFound) as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(name,)) for name in ("one", "two", "lost")]
    for thread in threads:
        thread.start()
    tasks = lambda: world.user.call("scheduler.tasks", None, Tasks).tasks  # noqa: E731
    wait_until(lambda: sum(task.completion_tokens > 5 for task in tasks()) == 3, what="three beginnings")
    shutil.rmtree(world.adapter("lost"))
    world.kill_driver()
    for thread in threads:
        thread.join(60)
    assert said == expected
    assert len(failed) == 1
    states = world.states()
    assert (states["tiny:two"], states["tiny:lost"]) == ("ready", "failed")
    world.unload("lost")
    world.unload("two")

"""The models service on a real kernel, with doubles of the scheduler and of a driver."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.sdk.messages import LoadedModel, LoadProgress, LoadRequest
from llmos.drivers.sdk.messages import Unload as UnloadRequest
from llmos.ipc.client import Client
from llmos.ipc.errors import (
    AccessDenied,
    InvalidArgument,
    IOFailure,
    LLMOSError,
    NotFound,
    NotSupported,
    TimedOut,
)
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.models.messages import (
    Chat,
    ChatMessage,
    Complete,
    Detokenize,
    Done,
    Generation,
    Load,
    ModelList,
    Park,
    Text,
    Tokenize,
    Unload,
)
from llmos.services.models.server import ModelsServer
from llmos.services.scheduler.messages import Emitted, Finished, Host, Submit, Tokens, Unhost
from llmos.services.scheduler.messages import Park as ParkHost
from tests.conftest import System, wait_until
from tests.services.models.gguf_file import METADATA, write_gguf

VERBS = ["chat", "complete", "list", "load", "unload", "park", "wake", "tokenize", "detokenize"]
CALLS = [f"models.{verb}" for verb in VERBS] + ["kernel.names"]
GRANTS = {
    "models": Grant(
        principal="models", tenant="system", serves="models",
        calls=["scheduler.submit", "scheduler.attach", "scheduler.host", "scheduler.unhost",
               "scheduler.park", "driver.d0.load", "driver.d0.unload", "driver.d0.park"],
    ),
    "scheduler": Grant(principal="scheduler", tenant="system", serves="scheduler"),
    "driver.d0": Grant(principal="driver.d0", tenant="system", serves="driver.d0"),
    "user": Grant(principal="user", tenant="local", models=["*"], calls=CALLS, band="realtime"),
    "poor": Grant(principal="poor", tenant="p", models=["tiny"], calls=CALLS, band="batch", max_tokens=3),
}  # fmt: skip


class FakeDriver(Server):
    name = "driver.d0"
    hold = threading.Event()

    def start(self) -> None:
        self.loads: list[LoadRequest] = []
        self.unloads: list[str] = []

    @method
    def load(self, request: LoadRequest, call: Incoming) -> Later:
        self.loads.append(request)
        call.chunk(LoadProgress("convert", 1, 2))
        self._finish(request, call)
        return Later()

    def _finish(self, request: LoadRequest, call: Incoming) -> None:
        if not self.hold.is_set():
            self.after(0.01, lambda: self._finish(request, call))
            return
        call.end(
            LoadedModel(
                model=request.model, family="llama", parameters=5, weight_bytes=1, pages=8, page_tokens=16,
                page_bytes=1, slots=2, max_context=100, chunk_tokens=16, vocab_size=262, stop_tokens=[260],
                attention="xla",
            )
        )  # fmt: skip

    @method
    def unload(self, request: UnloadRequest, call: Incoming) -> None:
        self.unloads.append(request.model)


class FakeScheduler(Server):
    """Answers each task with its own prompt, one token a step, all tokens on the attach stream."""

    name = "scheduler"

    def start(self) -> None:
        self.hosted: list[str] = []
        self.unhosted: list[str] = []
        self.submits: list[Submit] = []
        self.tenants: list[str] = []
        self.canceled = threading.Event()
        self.stream: Incoming | None = None

    @method
    def attach(self, request: None, call: Incoming) -> Later:
        self.stream = call
        return Later()

    @method
    def host(self, request: Host, call: Incoming) -> None:
        self.hosted.append(f"{request.driver}/{request.model.model}")

    @method
    def unhost(self, request: Unhost, call: Incoming) -> None:
        self.unhosted.append(f"{request.driver}/{request.model}")

    @method
    def park(self, request: ParkHost, call: Incoming) -> Later:
        call.chunk(None)
        return Later()

    @method
    def submit(self, request: Submit, call: Incoming) -> Later:
        assert self.stream is not None
        self.submits.append(request)
        self.tenants.append(call.origin.grant.tenant)
        call.on_cancel = self.canceled.set
        out = request.tokens[: request.max_tokens]
        for offset, token in enumerate(out):
            self.stream.chunk(Emitted([Tokens(call.head.id, offset, [token])]))
        if request.band != "realtime":  # in which a task of these tests never ends
            usage = Finished(
                task=1, reason="length", prompt_tokens=len(request.tokens), cached_tokens=0,
                completion_tokens=len(out), queued=0.0, first_token=0.0, total=0.0,
            )  # fmt: skip
            call.end(usage)
        return Later()


class World(System):
    def __init__(self, damaged: bool = False) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="llmos-t")), GRANTS)
        changes = {
            "tokenizer.chat_template": "{{ messages[-1]['content'] }}",
            "tokenizer.ggml.pre": "unheard-of" if damaged else "gpt-2",
        }
        model = write_gguf(self.run / "m.gguf", {**METADATA, **changes})
        self.write_manifest(
            Manifest(
                drivers=[DriverSpec(name="d0", kind="null")],
                models=[
                    ModelSpec(name="tiny", driver="d0", source=str(model)),
                    ModelSpec(name="gone", driver="d0", source="/nowhere/model.gguf"),
                ],
            )
        )
        self.kernel()
        FakeDriver.hold.clear()
        self.serve(ModelsServer(self.run, self.run / "cache"))
        self.wait_ready("models")
        self.user = self.client()

    def start_rest(self) -> None:
        self.driver = FakeDriver(self.run)
        self.scheduler = FakeScheduler(self.run)
        self.serve(self.driver)
        self.serve(self.scheduler)
        FakeDriver.hold.set()
        self.wait_state("ready")

    def line(self, name: str = "tiny", client: Client | None = None) -> Any:
        lines = (client or self.user).call("models.list", None, ModelList).models
        return next((line for line in lines if line.name == name), None)

    def wait_state(self, state: str) -> None:
        wait_until(lambda: self.line().state == state, what=state)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    world.start_rest()
    yield world
    world.close()
    shutil.rmtree(world.run, ignore_errors=True)


@pytest.fixture
def fresh() -> Iterator[World]:
    world = World()
    yield world
    FakeDriver.hold.set()
    world.close()
    shutil.rmtree(world.run, ignore_errors=True)


def chat(text: str, **values: Any) -> Chat:
    return Chat(model="tiny", messages=[ChatMessage("user", text)], generation=Generation(**values))


def run(client: Client, target: str, request: Any) -> tuple[str, Any]:
    """The text of the chunks, and the end."""
    *chunks, end = client.stream(target, request)
    return "".join(chunk[0] for chunk in chunks), end


def test_a_chat_is_templated_tokenized_and_streamed_back(world: World) -> None:
    text, end = run(world.user, "models.chat", chat("hé 👋!"))
    assert text == end["text"] == "hé 👋!"
    assert end["usage"]["prompt_tokens"] == len("hé 👋!".encode())
    assert (end["reason"], world.scheduler.tenants[-1]) == ("length", "local")
    assert world.scheduler.submits[-1].stop == [260]
    assert world.scheduler.submits[-1].label == "chat"


def test_chunks_are_whole_characters_and_count_tokens(world: World) -> None:
    *chunks, _ = world.user.stream("models.chat", chat("a👋b"))
    assert chunks == [["a", 1], ["👋", 5], ["b", 6]]


def test_without_a_stream_there_is_only_the_end(world: World) -> None:
    answers = list(world.user.stream("models.chat", chat("abc", stream=False), end=Done))
    assert [answer.text for answer in answers] == ["abc"]


def test_a_completion_takes_text_or_token_ids(world: World) -> None:
    client = world.user
    assert run(client, "models.complete", Complete(model="tiny", prompt="xyz"))[0] == "xyz"
    ids = client.call("models.tokenize", Tokenize("tiny", "xyz"))["tokens"]
    assert run(client, "models.complete", Complete(model="tiny", prompt=ids))[0] == "xyz"
    assert client.call("models.detokenize", Detokenize("tiny", ids)) == "xyz"


def test_a_stop_string_ends_the_task_at_once(world: World) -> None:
    world.scheduler.canceled.clear()
    text, end = run(world.user, "models.chat", chat("one two three", stop=["two"], band="realtime"))
    assert (text, end["reason"]) == ("one ", "stop")
    assert end["usage"]["completion_tokens"] == len("one two")
    assert world.scheduler.canceled.wait(5)


def test_leaving_a_stream_kills_its_task(world: World) -> None:
    world.scheduler.canceled.clear()
    for chunk in world.user.stream("models.chat", chat("abc", band="realtime"), Text):
        assert chunk.text == "a"
        break
    assert world.scheduler.canceled.wait(5)


def test_what_the_caller_may_not_do_is_refused(world: World) -> None:
    poor = world.client("poor")
    assert run(poor, "models.chat", chat("abcdef", band="batch"))[0] == "abc"
    for values in ({"band": "interactive"}, {"band": "batch", "max_tokens": 4}):
        with pytest.raises(AccessDenied):
            run(poor, "models.chat", chat("abc", **values))
    with pytest.raises(AccessDenied, match="gone"):
        poor.call("models.tokenize", Tokenize("gone", "x"))
    assert world.line("gone", poor) is None


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Chat(model="other", messages=[ChatMessage("user", "x")]), NotFound, "there is: tiny, gone"),
        (Chat(model="gone", messages=[ChatMessage("user", "x")]), NotFound, "llmos pull gone"),
        (Chat(model="tiny", messages=[]), InvalidArgument, "messages"),
        (chat("x", temperature=-1.0), InvalidArgument, "temperature"),
        (chat("x" * 120), InvalidArgument, "120 tokens"),
        (chat("x" * 100_000), InvalidArgument, "or more"),
        (chat("x", max_tokens=500), InvalidArgument, "99"),
    ],
)
def test_wrong_requests_say_what_is_wrong(
    world: World, request_: Chat, error: type[LLMOSError], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.user.call("models.chat", request_)


def test_models_are_listed_with_their_state(world: World) -> None:
    line = world.line()
    assert (line.state, line.family, line.context, line.driver) == ("ready", "llama", 100, "d0")
    assert world.line("gone").state == "missing"
    request = world.driver.loads[0]
    assert request.source.endswith("m.gguf")
    assert request.cache.endswith("converted")


def test_unloading_takes_a_model_away_until_it_is_loaded_again(world: World) -> None:
    client = world.user
    client.call("models.unload", Unload("tiny"))
    assert (world.driver.unloads, world.scheduler.unhosted) == (["tiny"], ["d0/tiny"])
    with pytest.raises(NotFound, match="llmos load tiny"):
        run(client, "models.chat", chat("x"))
    *progress, end = client.stream("models.load", Load("tiny"))
    assert progress == [{"phase": "convert", "done": 1, "total": 2}]
    assert end["state"] == "ready"
    assert list(client.stream("models.load", Load("tiny")))[-1]["state"] == "ready"
    assert run(client, "models.chat", chat("x"))[0] == "x"


def test_a_driver_that_cannot_park_a_model_says_so_and_goes_on_serving_it(world: World) -> None:
    hosted = len(world.scheduler.hosted)
    with pytest.raises(NotSupported):
        world.user.call("models.park", Park("tiny"))
    wait_until(lambda: len(world.scheduler.hosted) > hosted, what="the model hosted again")
    assert world.line().state == "ready"
    assert run(world.user, "models.chat", chat("x"))[0] == "x"


def test_a_call_waits_while_the_model_is_loading_but_not_past_its_deadline(fresh: World) -> None:
    with pytest.raises(TimedOut):
        fresh.user.call("models.chat", chat("x"), timeout=0.3)
    assert fresh.user.call("models.tokenize", Tokenize("tiny", "x"))["tokens"]
    assert fresh.line().state == "loading"
    answers: list[Any] = []
    other = fresh.client()
    asking = threading.Thread(target=lambda: answers.append(run(other, "models.chat", chat("hello"))))
    asking.start()
    fresh.start_rest()
    asking.join(10)
    assert answers[0][0] == "hello"


def test_a_driver_or_scheduler_that_was_started_anew_is_told_everything_again(fresh: World) -> None:
    fresh.start_rest()
    driver, scheduler = fresh.driver, fresh.scheduler
    driver.finish()
    fresh.wait_state("loading")
    fresh.driver = FakeDriver(fresh.run)
    fresh.serve(fresh.driver)
    fresh.wait_state("ready")
    assert scheduler.unhosted == ["d0/tiny"]
    assert scheduler.hosted == ["d0/tiny"] * 2
    scheduler.finish()
    fresh.wait_state("loading")
    fresh.scheduler = FakeScheduler(fresh.run)
    fresh.serve(fresh.scheduler)
    fresh.wait_state("ready")
    assert run(fresh.user, "models.chat", chat("again"))[0] == "again"


def test_a_scheduler_that_dies_in_the_middle_ends_the_stream_with_an_error(fresh: World) -> None:
    fresh.start_rest()
    stream = fresh.user.stream("models.chat", chat("abc", band="realtime"), Text)
    assert next(stream).text == "a"
    fresh.scheduler.finish()
    with pytest.raises(LLMOSError) as caught:
        list(stream)
    assert caught.value.code == "EHOSTDOWN"


def test_a_model_whose_tokenizer_is_unreadable_fails_by_name() -> None:
    world = World(damaged=True)
    try:
        world.wait_state("failed")
        assert "unheard-of" in world.line().error
        with pytest.raises(IOFailure, match="could not be loaded"):
            world.user.call("models.chat", chat("x"))
    finally:
        world.close()
        shutil.rmtree(world.run, ignore_errors=True)

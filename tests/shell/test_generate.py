"""``run`` and ``chat`` against a models service of the test's own."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llmos.ipc.errors import NotFound
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.services.models.messages import Chat, Complete, Done, ModelLine, ModelList, Text
from llmos.services.scheduler.messages import Finished
from llmos.shell import generate, main, session

USAGE = Finished(
    task=1,
    reason="stop",
    prompt_tokens=4,
    cached_tokens=1,
    completion_tokens=3,
    queued=0,
    first_token=0,
    total=0,
)


class Models(Server):
    """Says back what it was asked, a word at a time; "wait" is answered only by being cancelled."""

    name = "models"

    def start(self) -> None:
        self.requests: list[Chat | Complete] = []
        self.cancelled = 0

    @method
    def list(self, request: None, call: Incoming) -> ModelList:
        return ModelList([ModelLine(name="echo", state="ready", driver="x")])

    @method
    def chat(self, request: Chat, call: Incoming) -> Later:
        return self._answer(request, request.messages[-1].content or "", call)

    @method
    def complete(self, request: Complete, call: Incoming) -> Later:
        return self._answer(request, str(request.prompt), call)

    def _answer(self, request: Chat | Complete, text: str, call: Incoming) -> Later:
        if request.model != "echo":
            raise NotFound(f"no model {request.model!r} is served here")
        self.requests.append(request)
        for number, word in enumerate(text.split(), 1):
            call.chunk(Text(f"{word} ", number))
        if text.startswith("wait"):
            call.on_cancel = self._on_cancel
        else:
            call.end(Done(text=f"{' '.join(text.split())} !", reason="stop", usage=USAGE))
        return Later()

    def _on_cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
def models(system: Callable[[dict[str, Grant]], Any], monkeypatch: pytest.MonkeyPatch) -> Models:
    running = system(
        {
            "models": Grant(principal="models", tenant="system", serves="models"),
            "user": Grant(principal="user", tenant="local", calls=["models.*", "kernel.names"]),
        }
    )
    running.kernel()
    server: Models = running.serve(Models(running.run))
    running.wait_ready("models")
    monkeypatch.setattr(session, "connect", lambda *_: running.client())
    return server


def ask(*arguments: str) -> int:
    return main.main(["run", *arguments])


def test_the_answer_goes_to_stdout_and_nothing_else(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("echo", "to be or not") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("to be or not !\n", "")


def test_the_options_reach_the_model(models: Models) -> None:
    ask("echo", "hi", "--max-tokens", "9", "--temperature", "0.5", "--seed", "3", "--system", "be brief")
    request = models.requests[0]
    assert isinstance(request, Chat)
    assert [(m.role, m.content) for m in request.messages] == [("system", "be brief"), ("user", "hi")]
    given = request.generation
    assert (given.max_tokens, given.temperature, given.seed) == (9, 0.5, 3)


def test_raw_continues_the_text_without_a_template(models: Models) -> None:
    ask("echo", "Once upon", "--raw")
    assert models.requests == [
        Complete(model="echo", prompt="Once upon", generation=models.requests[0].generation)
    ]


def test_a_prompt_may_come_from_stdin(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped in\n"))
    assert ask("echo") == 0
    assert isinstance(models.requests[0], Chat)
    assert models.requests[0].messages[0].content == "piped in\n"


def test_statistics_go_to_stderr(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    ask("echo", "hi there", "--stats")
    words = capsys.readouterr().err
    assert "4 tokens in (1 cached), 3 out; first token " in words
    assert "tokens/s" in words


def test_an_error_is_one_typed_line(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("other", "hi") == 1
    assert capsys.readouterr().err == "llmos run: ENOENT: no model 'other' is served here\n"
    assert ask("echo", "hi", "--max-tokens", "-1") == 1
    assert "EINVAL" in capsys.readouterr().err


def test_a_conversation_keeps_its_history_until_it_is_cleared(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/clear\nthree\n"))
    assert main.main(["chat"]) == 0
    asked = [
        [m.content for m in request.messages] for request in models.requests if isinstance(request, Chat)
    ]
    assert asked == [["one"], ["one", "one !", "two"], ["three"]]
    assert capsys.readouterr().out == "one !\ntwo !\nthree !\n"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = generate.put

    def interrupted(piece: str) -> None:
        put(piece)
        if piece == "here ":
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "put", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("wait here\nand on\n"))
    assert generate.chat(argparse.Namespace(**vars(main.parser().parse_args(["chat", "echo"])))) == 0
    assert models.cancelled == 1
    last = models.requests[-1]
    assert isinstance(last, Chat)
    assert [m.content for m in last.messages] == ["wait here", "wait here ", "and on"]

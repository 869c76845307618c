"""``llmos run`` and ``llmos chat``: talking to a model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from llmos.ipc.client import Client
from llmos.ipc.errors import InvalidArgument, NotFound
from llmos.services.models.messages import (
    ANSWERING,
    Chat,
    ChatMessage,
    Complete,
    Done,
    Generation,
    ModelList,
    Text,
)
from llmos.shell import session
from llmos.shell.output import say

ANSWER_SECONDS = 3600.0
MAX_PROMPT = 4 << 20


@dataclass
class Answer:
    """One answer: its text so far, and when things happened (seconds of a monotonic clock)."""

    asked: float
    text: str = ""
    first: float = 0.0
    last: float = 0.0
    done: Done | None = None

    def take(self, chunk: Text | Done, now: float) -> str:
        """Take in a chunk; the piece of text to print."""
        if isinstance(chunk, Done):
            # A stream may leave its last piece to the end.
            piece = chunk.text.removeprefix(self.text)
            self.done, self.text = chunk, chunk.text
        else:
            piece = chunk.text
            self.text += piece
        self.first, self.last = self.first or now, now
        return piece

    def stats(self) -> str:
        """Time to first token and rate after it, as the caller saw them."""
        if self.done is None:
            return "no answer"
        usage, span = self.done.usage, self.last - self.first
        rate = (
            f"{(usage.completion_tokens - 1) / span:.1f}" if span > 0 and usage.completion_tokens > 1 else "-"
        )
        return (
            f"{usage.prompt_tokens} tokens in ({usage.cached_tokens} cached), {usage.completion_tokens} out; "
            f"first token {1000 * (self.first - self.asked):.0f} ms, then {rate} tokens/s; "
            f"{self.last - self.asked:.2f} s in all; ended by {self.done.reason}"
        )


def run(options: argparse.Namespace) -> int:
    """Ask once."""
    prompt = _read_stdin() if options.prompt == "-" else options.prompt
    generation = _generation(options)
    with session.connect() as client:
        if options.raw:
            request: Chat | Complete = Complete(model=options.model, prompt=prompt, generation=generation)
        else:
            messages = [*_system(options), ChatMessage("user", prompt)]
            request = Chat(model=options.model, messages=messages, generation=generation)
        answer = Answer(time.monotonic())
        for piece in stream(client, request, answer):
            put(piece)
    put("" if answer.text.endswith("\n") else "\n")
    if options.stats:
        say(answer.stats())
    return 0


def chat(options: argparse.Namespace) -> int:
    """Ask and answer until Ctrl-D."""
    with session.connect() as client:
        model = options.model or _first_ready(client)
        say(f"talking to {model}; Ctrl-C stops an answer, /clear forgets, Ctrl-D leaves")
        history = _system(options)
        while (line := _prompt()) is not None:
            if line == "/clear":
                history = _system(options)
            elif line:
                history.append(ChatMessage("user", line))
                answer = _reply(client, model, history, _generation(options))
                history.append(ChatMessage("assistant", answer.text))
    return 0


def stream(client: Client, request: Chat | Complete, answer: Answer) -> Iterator[str]:
    """The pieces of an answer as they come; leaving early cancels the request."""
    method = "models.chat" if isinstance(request, Chat) else "models.complete"
    for chunk in client.stream(method, request, Text, end=Done, timeout=ANSWER_SECONDS):
        yield answer.take(chunk, time.monotonic())


def _reply(client: Client, model: str, history: list[ChatMessage], generation: Generation) -> Answer:
    """Print an answer; Ctrl-C ends it, and what was said until then counts."""
    answer = Answer(time.monotonic())
    try:
        for piece in stream(client, Chat(model=model, messages=history, generation=generation), answer):
            put(piece)
    except KeyboardInterrupt:
        say(" (stopped)")
    print()
    return answer


def _prompt() -> str | None:
    """A line from the person; None when there will be no more."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() its editing keys and history
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            return None


def _generation(options: argparse.Namespace) -> Generation:
    if options.max_tokens < 0 or options.temperature < 0:
        raise InvalidArgument("--max-tokens and --temperature must not be negative")
    return Generation(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        band=options.band,
    )


def _system(options: argparse.Namespace) -> list[ChatMessage]:
    return [ChatMessage("system", options.system)] if options.system else []


def _read_stdin() -> str:
    text = sys.stdin.read(MAX_PROMPT + 1)
    if len(text) > MAX_PROMPT:
        raise InvalidArgument(f"the prompt on stdin is over {MAX_PROMPT} characters")
    return text


def _first_ready(client: Client) -> str:
    models = client.call("models.list", None, ModelList).models
    for line in models:
        if line.state in ANSWERING and line.kind == "decoder":
            return line.name
    states = ", ".join(f"{line.name} is {line.state}" for line in models) or "there is none"
    raise NotFound(f"no model is ready: {states}")


def put(piece: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()

"""kill -9 of any one process: it is back by itself, the next request works, and streams go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models.messages import Detokenize

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

PROCESSES = ("kernel", "security", "memory", "scheduler", "models", "monitor", "gateway", "driver.jax0")
LENGTH = 64
SEEN = 10


def say(up: Any) -> str:
    """One question, by the official client as it comes: it repeats what a dying server took with it."""
    answer = up.openai(retries=openai.DEFAULT_MAX_RETRIES).chat.completions.create(
        model=DEFAULT_MODEL, temperature=0, max_tokens=8,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )  # fmt: skip
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_killed_while_idle_is_back_by_itself_and_the_next_request_works(up: Any, name: str) -> None:
    before = say(up)
    others = {process.name: process.pid for process in up.status().processes if process.name != name}
    restarts = up.process(name).restarts
    old = up.kill(name)
    if name == "gateway":  # there is nobody to ask until it listens again
        up.wait_restarted(name, old)
    assert say(up) == before, "asked at once with the same key, the answer is the same"
    up.wait_restarted(name, old)
    assert up.process(name).restarts == restarts + 1
    assert {p.name: p.pid for p in up.status().processes if p.name != name} == others, "nobody else was hurt"
    up.wait_healthy()


def stream(up: Any, prompt: list[int], disturb: Callable[[], None] | None = None) -> tuple[str, int]:
    """The text of a greedy stream and its number of tokens; ``disturb`` is called in the middle of it."""
    chunks = up.openai().completions.create(
        model=DEFAULT_MODEL, prompt=prompt, max_tokens=LENGTH, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, tokens = "", 0
    for number, chunk in enumerate(chunks):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.text
        if number == SEEN and disturb is not None:
            disturb()
    return text, tokens


@pytest.mark.parametrize("name", ["memory", "driver.jax0"])
@pytest.mark.parametrize("case", ["code"])
def test_a_stream_survives_and_says_what_it_would_have_said(
    up: Any, reference: dict[str, Any], case: str, name: str
) -> None:
    recorded = next(each for each in reference["cases"] if each["name"] == case)
    assert min(recorded["gaps"][:LENGTH]) > 10 * reference["tolerance"], "no near-tie may excuse a difference"
    old: list[int] = []
    text, tokens = stream(up, recorded["prompt"], lambda: old.append(up.kill(name)))
    assert old, "the process was killed in the middle of the stream"
    up.wait_restarted(name, old[0])
    with up.client() as client:
        expected = client.call("models.detokenize", Detokenize(DEFAULT_MODEL, recorded["output"][:LENGTH]))
    assert (text, tokens) == (expected, LENGTH)
    assert stream(up, recorded["prompt"]) == (expected, LENGTH), "and so does an undisturbed one"
    up.wait_healthy()

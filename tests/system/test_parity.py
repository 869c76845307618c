"""Token parity of the full system in float32 with the recorded run of Hugging Face transformers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos.ipc import paths
from llmos.ipc.aio import AsyncClient
from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models.messages import Detokenize
from llmos.services.scheduler.messages import Finished, Submit, Tokens

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

LENGTH = 64
PAGE = 16
CASES = ["short", "chat", "long", "non-latin", "code", "chat-code", "chat-turns", "chat-long", "data"]
CACHED = ["long", "non-latin", "code", "chat-turns"]
Output = tuple[list[int], Finished]


def case_of(reference: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(case) for case in reference["cases"] if case["name"] == name)


def generate(up: Any, *prompts: list[int]) -> list[Output]:
    """Submit all prompts at the same moment; what each of them produced."""

    async def one(client: AsyncClient, prompt: list[int]) -> Output:
        submit = Submit(model=DEFAULT_MODEL, tokens=prompt, max_tokens=LENGTH, label="parity")
        output: list[int] = []
        async with client.stream("scheduler.submit", submit, Tokens, Finished, timeout=300.0) as answers:
            async for answer in answers:
                if isinstance(answer, Finished):
                    return output, answer
                assert answer.offset == len(output), "tokens are streamed once and in order"
                output += answer.tokens
        raise AssertionError("the stream has no end")

    async def every() -> list[Output]:
        async with AsyncClient(paths.read_token("user", up.run), run=up.run) as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    return asyncio.run(every())


def check(reference: dict[str, Any], case: dict[str, Any], output: Output) -> None:
    """Equal to the reference up to the first place where the reference itself was undecided."""
    tokens, finished = output
    assert len(tokens) == finished.completion_tokens == LENGTH
    assert finished.prompt_tokens == len(case["prompt"])
    for place, (token, expected, gap) in enumerate(zip(tokens, case["output"], case["gaps"], strict=False)):
        if token != expected:
            assert gap <= reference["tolerance"], f"{case['name']} differs at {place}, where the gap is {gap}"
            return


@pytest.mark.parametrize("name", CASES)
def test_alone(up: Any, reference: dict[str, Any], name: str) -> None:
    case = case_of(reference, name)
    check(reference, case, generate(up, case["prompt"])[0])


@pytest.mark.parametrize("name", CACHED)
def test_from_a_cached_prefix(up: Any, reference: dict[str, Any], name: str) -> None:
    case = case_of(reference, name)
    first, again = generate(up, case["prompt"])[0], generate(up, case["prompt"])[0]
    assert again[1].cached_tokens > 0
    assert again[0] == first[0]
    check(reference, case, again)


@pytest.mark.parametrize("cached", [False, True], ids=["nothing-cached", "all-cached"])
def test_in_a_mixed_batch_of_sixteen(up: Any, reference: dict[str, Any], cached: bool) -> None:
    cases = (reference["cases"] * 2)[:16]
    if not cached:  # memory that was started anew knows no prefix
        up.wait_restarted("memory", up.kill("memory"))
    outputs = generate(up, *(case["prompt"] for case in cases))
    hits = [finished.cached_tokens > 0 for _, finished in outputs[: len(CASES)]]
    assert hits == [cached and len(case["prompt"]) > PAGE for case in cases[: len(CASES)]]
    for case, output in zip(cases, outputs, strict=True):
        check(reference, case, output)


def test_what_http_says_is_the_text_of_those_tokens(up: Any, reference: dict[str, Any]) -> None:
    case = case_of(reference, "non-latin")
    with up.client() as client:
        expected = client.call("models.detokenize", Detokenize(DEFAULT_MODEL, case["output"][:LENGTH]))
    asked = {"model": DEFAULT_MODEL, "prompt": case["prompt"], "max_tokens": LENGTH, "temperature": 0}
    answer = up.openai().completions.create(**asked, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == expected
    stream = up.openai().completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream) == expected

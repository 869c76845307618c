"""Several samples of one request: over HTTP through the official client, over shared prompt pages, under the
same limits as so many requests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from llmos.services.memory.messages import ArenaUsage, Usage
from llmos.services.scheduler.messages import Kill, Tasks
from tests.conftest import wait_until
from tests.system.conftest import Running
from tests.system.small import MODEL, PAGE, small_system

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

COUNT = 12


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    driver = "step_ms = 5.0, prefill_us = 100.0"
    with small_system(driver, "slots = 8\npages = 256\nmax_context = 1024\nchunk_tokens = 64") as running:
        yield running


def arena(up: Running) -> ArenaUsage:
    with up.client() as client:
        (found,) = client.call("memory.usage", None, Usage).arenas
    return found


def tasks(up: Running) -> list[int]:
    with up.client() as client:
        return [line.task for line in client.call("scheduler.tasks", None, Tasks).tasks]


def test_samples_have_indexes_and_one_usage(small: Running) -> None:
    answer = small.openai().completions.create(
        model=MODEL, prompt=[5, 6, 7], n=4, max_tokens=COUNT, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3, "which the samples share"
    assert answer.usage.completion_tokens == 4 * COUNT


def test_a_chat_streams_its_samples_side_by_side(small: Running) -> None:
    chunks = list(
        small.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], n=3, max_tokens=COUNT, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )
    )  # fmt: skip
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    texts = ["".join(p.delta.content or "" for p in pieces if p.index == index) for index in range(3)]
    assert texts[0]
    assert texts[0] == texts[1] == texts[2], "the null driver knows no chance"
    assert [p.index for p in pieces if p.finish_reason] != []
    assert sorted(p.index for p in pieces if p.finish_reason) == [0, 1, 2]
    first_end = next(i for i, p in enumerate(pieces) if p.finish_reason)
    assert {p.index for p in pieces[:first_end] if p.delta.content} == {0, 1, 2}, "none waits for another"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3 * COUNT


def test_the_prompt_is_computed_once_and_its_pages_are_shared(small: Running) -> None:
    prompt = [(3 * k) % 251 for k in range(20 * PAGE + 5)]
    before = arena(small)
    stream = small.openai().completions.create(
        model=MODEL, prompt=prompt, n=6, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    said: set[int] = set()
    while len(said) < 6:
        said |= {choice.index for choice in next(stream).choices}
    after = arena(small)
    assert after.hit_tokens - before.hit_tokens == 5 * 20 * PAGE, "all but one found the whole pages there"
    assert after.owned - before.owned < 20 + 6 * 8, "of the prompt's pages there is one copy"
    stream.close()
    wait_until(lambda: not tasks(small), what="the end of all samples")
    assert arena(small).owned == before.owned


def test_killing_one_sample_ends_the_request_and_frees_the_others(small: Running) -> None:
    stream = small.openai().completions.create(
        model=MODEL, prompt=[9] * 40, n=4, max_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_until(lambda: len(tasks(small)) == 4, what="four tasks")
    with small.client() as client:
        client.call("scheduler.kill", Kill(tasks(small)[2]))
    with pytest.raises(openai.APIError, match="killed"):
        list(stream)
    wait_until(lambda: not tasks(small) and arena(small).owned == 0, what="all samples gone")


def test_each_sample_counts_for_the_limits(small: Running) -> None:
    key = small.mint("--tenant", "sampler", "--tokens-per-minute", "300")
    ask = small.openai(key).completions.create
    with pytest.raises(openai.RateLimitError, match="tokens_per_minute"):
        ask(model=MODEL, prompt=[1] * 50, n=4, max_tokens=50)
    wait_until(lambda: not tasks(small), what="the end of those that were let in")
    answer = ask(model=MODEL, prompt=[1] * 50, n=1, max_tokens=50, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50, "what the refused request would have produced was given back"
    few = small.mint("--tenant", "queued", "--max-running", "1", "--max-queued", "2")
    with pytest.raises(openai.RateLimitError, match="max_queued"):
        small.openai(few).completions.create(model=MODEL, prompt=[1] * 50, n=5, max_tokens=50)

"""A model that speculates: the tokens are those of plain decoding, there are fewer steps, and nothing is
written where a sequence holds no page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Chunk, Growth, LoadRequest, Sampling
from llmos.ipc.errors import InvalidArgument

CIRCLE = [11, 12, 13, 14, 15, 16] * 4
PROMPTS = [CIRCLE, [5, 9, 77, 31], list(range(3, 60)), [88] * 17, [7], [40, 41, 42, 43] * 5 + [9, 40, 41]]
SAMPLED = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=1234)
COOL = Sampling(temperature=0.2, seed=5)
PENALISED = Sampling(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.3, seed=7)


def request(folder: Path, cache: Path, **fields: Any) -> LoadRequest:
    values: dict[str, Any] = {
        "model": "guesses", "source": str(folder), "cache": str(cache), "page_tokens": 8, "pages": 256,
        "slots": 8, "max_context": 256, "chunk_tokens": 64, "speculation": "ngram",
        "speculation_tokens": 7,
    }  # fmt: skip
    return LoadRequest(**(values | fields))


@pytest.fixture(scope="module")
def guessing(tiny_folder: Path, cache_folder: Path, helpers: Any) -> Iterator[tuple[JaxDriver, Any]]:
    driver = JaxDriver("cpu")
    yield driver, driver.load(request(tiny_folder, cache_folder), helpers.ignore)
    driver.unload("guesses")


@pytest.fixture
def guesser(guessing: tuple[JaxDriver, Any], helpers: Any) -> Iterator[Any]:
    """A runner whose every step verifies guesses, if a program for its batch exists."""
    runner = helpers.Runner(*guessing)
    speculation_of(runner).policy.always = True
    yield runner
    runner.clear()
    speculation_of(runner).policy.always = False


def speculation_of(runner: Any) -> Any:
    return runner.driver._engines["guesses"][0].speculation


@pytest.mark.parametrize("sampling", [Sampling(), COOL, SAMPLED], ids=["greedy", "cool", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["circle", "short", "pages", "same", "one", "pattern"])
def test_tokens_are_those_of_plain_decoding(
    runner: Any, guesser: Any, helpers: Any, prompt: list[int], sampling: Sampling
) -> None:
    task = helpers.Task(prompt, 60, sampling=sampling)
    assert guesser.run(task) == runner.run(task)


def test_a_text_that_repeats_takes_fewer_steps(
    tiny_tensors: Any, tmp_path: Path, cache_folder: Path, helpers: Any
) -> None:
    # Without attention the next token follows from the last alone, so the model soon goes in a circle.
    tensors = {n: x * 0 if "o_proj" in n else x for n, x in tiny_tensors.items()}
    folder = helpers.write_folder(tmp_path / "circle", helpers.TINY, tensors)
    driver = JaxDriver("cpu")
    runner = helpers.Runner(driver, driver.load(request(folder, cache_folder), helpers.ignore))
    speculation_of(runner).policy.always = True
    start = runner.start(0, helpers.Task([7], 100))
    done = runner.steps(100, start=[start], chunks=[Chunk(0, 0, 0, 1)], decode=[0])
    assert helpers.tokens_of(done, 0) == helpers.dense_greedy(helpers.TINY, tensors, [7], 100)
    assert max(len(step.tokens) for step in done) == 8
    assert len(done) < 40
    driver.unload("guesses")


def test_a_mixed_batch_equals_each_alone(runner: Any, guesser: Any, helpers: Any) -> None:
    kinds = [Sampling(), SAMPLED, COOL]
    tasks = [helpers.Task(p, 30 + i, sampling=s) for i, (p, s) in enumerate(zip(PROMPTS, kinds))]
    assert guesser.run(*tasks) == [runner.run(task)[0] for task in tasks]


def test_a_sequence_with_penalties_is_decoded_plainly_and_right(
    runner: Any, guesser: Any, helpers: Any
) -> None:
    task = helpers.Task(CIRCLE, 30, sampling=PENALISED)
    assert guesser.run(task) == runner.run(task)


def test_a_full_batch_is_decoded_plainly_and_right(runner: Any, guesser: Any, helpers: Any) -> None:
    tasks = [helpers.Task(CIRCLE[i:], 20) for i in range(8)]
    assert guesser.run(*tasks) == runner.run(*tasks)


def test_a_displaced_sequence_continues_as_it_would_have(runner: Any, guesser: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task(CIRCLE, 50, sampling=COOL))
    known = CIRCLE + whole[:17]
    (rest,) = guesser.run(helpers.Task(known, 33, prompt=len(CIRCLE), sampling=COOL))
    assert rest == whole[17:]


def test_a_prefix_in_cached_pages_can_be_looked_up(runner: Any, guesser: Any, helpers: Any) -> None:
    task = helpers.Task(CIRCLE, 40)
    whole = guesser.run(task)
    shared = guesser.pages(0, 16) + guesser.pages(3, 80)[2:]
    assert guesser.run(helpers.Task(CIRCLE, 40, cached=16, pages=shared)) == whole == runner.run(task)


def test_a_stop_token_among_those_accepted_ends_the_sequence(runner: Any, guesser: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task(CIRCLE, 60))
    for stop in sorted(set(whole[5:])):
        expected = whole[: whole.index(stop) + 1]
        start = guesser.start(0, helpers.Task(CIRCLE, 60, stop=[99, stop]))
        done = guesser.steps(60, start=[start], chunks=[Chunk(0, 0, 0, len(CIRCLE))], decode=[0])
        assert helpers.tokens_of(done, 0) == expected
        assert [end for step in done for end in step.finished] == [(0, "stop")]
        guesser.clear()


@pytest.mark.parametrize("count", range(1, 12))
def test_the_limit_is_never_passed(runner: Any, guesser: Any, helpers: Any, count: int) -> None:
    start = guesser.start(0, helpers.Task(CIRCLE, count))
    done = guesser.steps(30, start=[start], chunks=[Chunk(0, 0, 0, len(CIRCLE))], decode=[0])
    assert helpers.tokens_of(done, 0) == runner.run(helpers.Task(CIRCLE, count))[0]
    assert [end for step in done for end in step.finished] == [(0, "length")]


@pytest.mark.parametrize("always", [True, False], ids=["verifying", "plain"])
def test_a_sequence_without_a_page_holds_still_until_it_is_grown(
    runner: Any, guesser: Any, helpers: Any, always: bool
) -> None:
    (whole,) = runner.run(helpers.Task(CIRCLE, 60))
    speculation_of(guesser).policy.always = always
    pages = guesser.pages(0, 84)
    start = guesser.start(0, helpers.Task(CIRCLE, 60, pages=pages[:4]))
    done = guesser.steps(25, start=[start], chunks=[Chunk(0, 0, 0, len(CIRCLE))], decode=[0])
    assert helpers.tokens_of(done, 0) == whole[: 4 * 8 + 1 - len(CIRCLE)]
    assert guesser.steps(3, decode=[0]) == []
    spare = guesser.driver._engines["guesses"][0].replica.caches[0].k[-1]
    assert not np.asarray(spare).any()
    done += guesser.steps(6, grow=[Growth(0, pages[4:6])], decode=[0])
    done += guesser.steps(60, grow=[Growth(0, pages[6:])], decode=[0])
    assert helpers.tokens_of(done, 0) == whole


def test_the_next_quantum_may_start_while_steps_are_pending(runner: Any, guesser: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task(CIRCLE, 60))
    start = guesser.start(0, helpers.Task(CIRCLE, 60))
    first = helpers.Quantum(
        id=1, model="guesses", steps=5, start=[start], chunks=[Chunk(0, 0, 0, len(CIRCLE))], decode=[0]
    )
    pending = list(guesser.driver.execute(first))
    guesser.occupied = [0]
    pending += list(guesser.driver.execute(helpers.Quantum(id=2, model="guesses", steps=60, decode=[0])))
    assert helpers.tokens_of([step() for step in pending], 0) == whole


def test_a_failed_sequence_ends_with_error_and_harms_no_other(
    runner: Any, guesser: Any, helpers: Any
) -> None:
    tasks = [helpers.Task(CIRCLE, 10), helpers.Task([88] * 17, 10)]
    starts = [guesser.start(slot, task) for slot, task in enumerate(tasks)]
    guesser.steps(1, start=starts, chunks=[Chunk(0, 0, 0, len(CIRCLE)), Chunk(0, 1, 0, 17)])
    replica = guesser.driver._engines["guesses"][0].replica
    replica.caches = [type(c)(c.k, c.v.at[guesser.pages(0, 8)[0]].set(np.nan)) for c in replica.caches]
    done = guesser.steps(12, decode=[0, 1])
    assert done[0].finished == [(0, "error")]
    assert helpers.tokens_of(done, 0) == []
    assert helpers.tokens_of(done, 1) == runner.run(tasks[1])[0][1:]


def test_the_policy_learns_from_plain_steps_too(guesser: Any, helpers: Any) -> None:
    policy = speculation_of(guesser).policy
    policy.always = False
    guesser.run(helpers.Task(CIRCLE, 60))
    counted = speculation_of(guesser)
    assert sum(counted.gained.values()) > 0
    assert {size for size, _ in counted.steps} <= {1, 4, 8}
    assert policy.general.rate != 0.5


@pytest.mark.parametrize("tokens", [-1, 33])
def test_too_many_guesses_are_refused(
    tiny_folder: Path, cache_folder: Path, helpers: Any, tokens: int
) -> None:
    with pytest.raises(InvalidArgument, match="speculation_tokens"):
        JaxDriver("cpu").load(request(tiny_folder, cache_folder, speculation_tokens=tokens), helpers.ignore)

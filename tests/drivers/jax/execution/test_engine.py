"""One model's batch: tokens do not depend on company, chunks, pages or interruptions, nor on stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from llmos.drivers.jax.execution.spec import Key
from llmos.drivers.sdk.messages import Chunk, Growth, Sampling
from llmos.ipc.errors import InvalidArgument, NotFound

PROMPTS = [[5, 9, 77, 31], list(range(3, 60)), [88] * 17, list(range(100, 30, -1)), [7], list(range(40, 73))]
SAMPLED = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=1234)
PENALISED = Sampling(
    temperature=0.8,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    seed=7,
    logit_bias={9: 2.0},
)


@pytest.fixture(
    params=["tiny_driver", "staged_driver", "mixing_driver"], ids=["one-device", "two-stages", "mixing"]
)
def runner(request: pytest.FixtureRequest, helpers: Any) -> Iterator[Any]:
    runner = helpers.Runner(*request.getfixturevalue(request.param))
    yield runner
    runner.clear()


@pytest.mark.parametrize("prompt", PROMPTS[:4], ids=["short", "pages", "repeats", "chunks"])
def test_greedy_equals_a_dense_decoder(
    runner: Any, helpers: Any, tiny_tensors: Any, prompt: list[int]
) -> None:
    (tokens,) = runner.run(helpers.Task(prompt, 24))
    assert tokens == helpers.dense_greedy(helpers.TINY, tiny_tensors, prompt, 24)


@pytest.mark.parametrize("chunk", [1, 7, 8, 40, 64])
def test_chunked_prefill_equals_whole(runner: Any, helpers: Any, chunk: int) -> None:
    whole = runner.run(helpers.Task(PROMPTS[1], 12))
    assert runner.run(helpers.Task(PROMPTS[1], 12, chunk=chunk)) == whole


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_a_mixed_batch_equals_each_alone(runner: Any, helpers: Any, sampling: Sampling) -> None:
    kinds = [Sampling(), sampling, sampling, Sampling(temperature=0.5, seed=3), sampling, Sampling()]
    tasks = [helpers.Task(p, 20 + i, sampling=s) for i, (p, s) in enumerate(zip(PROMPTS, kinds))]
    alone = [runner.run(task)[0] for task in tasks]
    assert runner.run(*tasks) == alone


def test_prompts_short_enough_are_prefilled_by_the_program_that_decodes(
    mixing_driver: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = helpers.Runner(*mixing_driver)
    (engine,) = runner.driver._engines["tiny"]
    used: list[Key] = []
    get = engine.programs.get

    def noted(key: Key) -> Any:
        used.append(key)
        return get(key)

    monkeypatch.setattr(engine.programs, "get", noted)
    alone = [runner.run(helpers.Task(prompt, 12))[0] for prompt in (PROMPTS[0], PROMPTS[5])]
    first, second = helpers.Task(PROMPTS[0], 12), helpers.Task(PROMPTS[5], 12)
    begun = runner.steps(4, start=[runner.start(0, first)], chunks=[Chunk(0, 0, 0, 4)], decode=[0])
    used.clear()
    chunks = [Chunk(0, 1, 0, 17), Chunk(1, 1, 17, 16)]
    rest = runner.steps(13, start=[runner.start(1, second)], chunks=chunks, decode=[0, 1])
    assert [key for key in used if key[0] in ("mixed", "prefill")] == [("mixed", 8, 4)] * 2
    assert [helpers.tokens_of(begun + rest, slot) for slot in (0, 1)] == alone
    runner.clear()


def test_a_prefix_in_cached_pages_equals_a_full_start(runner: Any, helpers: Any) -> None:
    prompt = PROMPTS[1]
    task = helpers.Task(prompt, 12)
    (full,) = runner.run(task)
    own = runner.pages(3, len(prompt) + 12)
    shared = runner.pages(0, 48)[:6]
    (cached,) = runner.run(helpers.Task(prompt, 12, cached=48, pages=shared + own[6:]))
    assert cached == full


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_a_displaced_sequence_continues_as_it_would_have(
    runner: Any, helpers: Any, sampling: Sampling
) -> None:
    prompt = PROMPTS[5]
    (whole,) = runner.run(helpers.Task(prompt, 30, sampling=sampling))
    known = prompt + whole[:11]
    (rest,) = runner.run(helpers.Task(known, 19, prompt=len(prompt), sampling=sampling))
    assert whole[11:] == rest


def test_a_preempted_quantum_leaves_a_consistent_state(runner: Any, helpers: Any) -> None:
    task = helpers.Task(PROMPTS[1], 16, chunk=20)
    (whole,) = runner.run(task)
    quantum = {"start": [runner.start(0, task)], "chunks": [Chunk(i, 0, 20 * i, 20) for i in range(2)]}
    message = helpers.Quantum(id=1, model="tiny", steps=9, **quantum)
    iterator = runner.driver.execute(message)
    next(iterator)()
    iterator.close()
    runner.occupied = [0]
    done = runner.steps(6, chunks=[Chunk(0, 0, 20, 30), Chunk(1, 0, 50, 7)], decode=[0])
    done += runner.steps(40, decode=[0])
    assert helpers.tokens_of(done, 0) == whole
    assert len(done) == 6 + 11


def test_the_next_quantum_may_start_while_steps_are_pending(runner: Any, helpers: Any) -> None:
    task = helpers.Task(PROMPTS[0], 12)
    (whole,) = runner.run(task)
    first = helpers.Quantum(
        id=1, model="tiny", steps=5, start=[runner.start(0, task)], chunks=[Chunk(0, 0, 0, 4)], decode=[0]
    )
    pending = list(runner.driver.execute(first))
    runner.occupied = [0]
    second = helpers.Quantum(id=2, model="tiny", steps=20, decode=[0])
    pending += list(runner.driver.execute(second))
    steps = [step() for step in pending]
    assert helpers.tokens_of(steps, 0) == whole
    assert [step.quantum for step in steps] == [1] * 5 + [2] * 7


def test_rehearsing_programs_changes_nothing_for_sequences(runner: Any, helpers: Any) -> None:
    task = helpers.Task(PROMPTS[1], 12, sampling=SAMPLED)
    (whole,) = runner.run(task)
    half = runner.steps(8, start=[runner.start(0, task)], chunks=[Chunk(0, 0, 0, 57)], decode=[0])
    engine = runner.driver._engines["tiny"][0]
    engine.unrehearsed = engine.programs.ahead()
    while runner.driver.idle():
        pass
    rest = runner.steps(4, decode=[0])
    assert helpers.tokens_of(half + rest, 0) == whole


def test_pages_arrive_by_growth(runner: Any, helpers: Any) -> None:
    task = helpers.Task(PROMPTS[2], 30)
    (whole,) = runner.run(task)
    pages = runner.pages(0, 47)
    start = runner.start(0, helpers.Task(PROMPTS[2], 30, pages=pages[:3]))
    done = runner.steps(4, start=[start], chunks=[Chunk(0, 0, 0, 17)], decode=[0])
    done += runner.steps(8, grow=[Growth(0, pages[3:4]), Growth(0, pages[4:5])], decode=[0])
    done += runner.steps(30, grow=[Growth(0, pages[5:])], decode=[0])
    assert helpers.tokens_of(done, 0) == whole


def test_a_stop_token_ends_a_sequence_and_is_reported(runner: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task(PROMPTS[0], 20))
    stop = whole[6]
    expected = whole[: whole.index(stop) + 1]
    start = runner.start(0, helpers.Task(PROMPTS[0], 20, stop=[99, stop]))
    done = runner.steps(21, start=[start], chunks=[Chunk(0, 0, 0, 4)], decode=[0])
    assert helpers.tokens_of(done, 0) == expected
    assert [end for step in done for end in step.finished] == [(0, "stop")]
    assert runner.steps(3, decode=[0]) == []


def test_the_limit_ends_a_sequence(runner: Any, helpers: Any) -> None:
    start = runner.start(0, helpers.Task(PROMPTS[0], 5))
    done = runner.steps(21, start=[start], chunks=[Chunk(0, 0, 0, 4)], decode=[0])
    assert len(done) == 5
    assert done[-1].finished == [(0, "length")]
    assert len(helpers.tokens_of(done, 0)) == 5


def test_a_slot_outside_decode_holds_still(runner: Any, helpers: Any) -> None:
    tasks = [helpers.Task(prompt, 12) for prompt in PROMPTS[:2]]
    alone = [runner.run(task)[0] for task in tasks]
    starts = [runner.start(slot, task) for slot, task in enumerate(tasks)]
    chunks = [Chunk(0, 0, 0, 4), Chunk(0, 1, 0, 57)]
    done = runner.steps(5, start=starts, chunks=chunks, decode=[1])
    done += runner.steps(20, decode=[0, 1])
    assert [helpers.tokens_of(done, slot) for slot in (0, 1)] == alone
    assert done[0].slots == [0, 1]
    assert done[1].slots == [1]


def test_a_step_may_have_chunks_of_several_slots_and_decode(runner: Any, helpers: Any) -> None:
    tasks = [helpers.Task(PROMPTS[0], 14), helpers.Task(PROMPTS[2], 9), helpers.Task(PROMPTS[5], 9)]
    alone = [runner.run(task)[0] for task in tasks]
    starts = [runner.start(slot, task) for slot, task in enumerate(tasks)]
    chunks = [Chunk(0, 0, 0, 4), Chunk(2, 1, 0, 17), Chunk(2, 2, 0, 20), Chunk(3, 2, 20, 13)]
    done = runner.steps(40, start=starts, chunks=chunks, decode=[0, 1, 2])
    assert [helpers.tokens_of(done, slot) for slot in range(3)] == alone


def test_a_failed_sequence_ends_with_error_and_harms_no_other(runner: Any, helpers: Any) -> None:
    tasks = [helpers.Task(PROMPTS[0], 10), helpers.Task(PROMPTS[2], 10)]
    alone = [runner.run(task)[0] for task in tasks]
    starts = [runner.start(slot, task) for slot, task in enumerate(tasks)]
    runner.steps(1, start=starts, chunks=[Chunk(0, 0, 0, 4), Chunk(0, 1, 0, 17)])
    replica = runner.driver._engines["tiny"][0].replica
    broken = runner.pages(0, 8)[0]
    replica.caches = jax.tree.map(lambda part: part.at[broken].set(np.nan), replica.caches)
    done = runner.steps(12, decode=[0, 1])
    assert done[0].finished == [(0, "error")]
    assert helpers.tokens_of(done, 0) == []
    assert helpers.tokens_of(done, 1) == alone[1][1:]
    runner.steps(1, release=[0, 1])
    assert runner.run(*tasks) == alone


def test_an_unknown_model_is_not_found(runner: Any, helpers: Any) -> None:
    with pytest.raises(NotFound):
        runner.driver.execute(helpers.Quantum(id=1, model="other", steps=1))


def test_a_refused_quantum_changes_nothing(runner: Any, helpers: Any) -> None:
    task = helpers.Task(PROMPTS[0], 12)
    (whole,) = runner.run(task)
    runner.steps(1, start=[runner.start(0, task)], chunks=[Chunk(0, 0, 0, 4)])
    with pytest.raises(InvalidArgument):
        runner.steps(4, release=[0], start=[runner.start(1, task)], grow=[Growth(5, [1])])
    done = runner.steps(12, decode=[0])
    assert helpers.tokens_of(done, 0) == whole[1:]

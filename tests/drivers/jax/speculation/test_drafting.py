"""A draft model guesses: the tokens stay those of the model, whatever the draft model is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Chunk, Growth, LoadRequest, Sampling
from llmos.ipc.errors import InvalidArgument

PROMPT = [5, 9, 77, 31, 8] * 18
WARM = Sampling(temperature=0.7, seed=5)


def request(folder: Path, cache: Path, draft: Path | str, **fields: Any) -> LoadRequest:
    values: dict[str, Any] = {
        "model": "drafted", "source": str(folder), "cache": str(cache), "page_tokens": 8, "pages": 128,
        "slots": 2, "max_context": 256, "chunk_tokens": 64, "speculation": "draft",
        "speculation_tokens": 3, "draft": str(draft),
    }  # fmt: skip
    return LoadRequest(**(values | fields))


@pytest.fixture(scope="module")
def load(tiny_folder: Path, cache_folder: Path, helpers: Any) -> Iterator[Any]:
    """Loads the tiny model with a draft model; its every step verifies guesses."""

    drivers = []

    def make(draft: Path, **fields: Any) -> Any:
        drivers.append(driver := JaxDriver("cpu"))
        loaded = driver.load(request(tiny_folder, cache_folder, draft, **fields), helpers.ignore)
        driver._engines["drafted"][0].speculation.policy.always = True
        return helpers.Runner(driver, loaded)

    yield make
    for driver in drivers:
        driver.unload("drafted")


@pytest.fixture(scope="module")
def twin(load: Any, tiny_folder: Path) -> Any:
    """The draft model is the model itself, so that every guess is right."""
    return load(tiny_folder)


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_a_draft_model_that_is_the_model_is_always_right(
    runner: Any, twin: Any, helpers: Any, sampling: Sampling
) -> None:
    start = twin.start(0, helpers.Task(PROMPT, 41, sampling=sampling))
    done = twin.steps(60, start=[start], chunks=[Chunk(0, 0, 0, 60), Chunk(1, 0, 60, 30)], decode=[0])
    assert [helpers.tokens_of(done, 0)] == runner.run(helpers.Task(PROMPT, 41, sampling=sampling))
    assert [len(step.tokens) for step in done][:12] == [0, 1] + [4] * 10
    twin.clear()


def test_a_draft_model_that_knows_nothing_does_no_harm(
    runner: Any, load: Any, helpers: Any, tmp_path: Path
) -> None:
    shallow = helpers.TINY | {"num_hidden_layers": 1}
    stranger = helpers.write_folder(tmp_path / "draft", shallow, helpers.random_tensors(shallow, seed=3))
    other = load(stranger)
    task = helpers.Task(PROMPT, 40)
    assert other.run(task) == runner.run(task)


def test_two_sequences_are_drafted_at_once(runner: Any, twin: Any, helpers: Any) -> None:
    tasks = [helpers.Task(PROMPT, 30), helpers.Task([7, 7, 9], 25, sampling=WARM)]
    assert twin.run(*tasks) == [runner.run(task)[0] for task in tasks]


def test_what_plain_steps_produced_is_read_later(runner: Any, twin: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task(PROMPT, 50))
    policy = twin.driver._engines["drafted"][0].speculation.policy
    policy.always, policy.sizes = False, []
    done = twin.steps(
        12, start=[twin.start(0, helpers.Task(PROMPT, 50))],
        chunks=[Chunk(0, 0, 0, 60), Chunk(1, 0, 60, 30)], decode=[0],
    )  # fmt: skip
    policy.always, policy.sizes = True, [1, 2]
    done += twin.steps(40, decode=[0])
    assert helpers.tokens_of(done, 0) == whole
    assert [len(step.tokens) for step in done[12:20]] == [4] * 8
    twin.clear()


def test_pages_that_lack_stop_a_sequence_and_its_draft(runner: Any, twin: Any, helpers: Any) -> None:
    (whole,) = runner.run(helpers.Task([7, 8, 9], 40))
    pages = twin.pages(0, 43)
    start = twin.start(0, helpers.Task([7, 8, 9], 40, pages=pages[:2]))
    done = twin.steps(20, start=[start], chunks=[Chunk(0, 0, 0, 3)], decode=[0])
    assert helpers.tokens_of(done, 0) == whole[: 2 * 8 + 1 - 3]
    done += twin.steps(40, grow=[Growth(0, pages[2:])], decode=[0])
    assert helpers.tokens_of(done, 0) == whole
    twin.clear()


def test_another_vocabulary_or_a_shorter_sight_is_refused(
    tiny_folder: Path, cache_folder: Path, helpers: Any, tmp_path: Path
) -> None:
    for field, value, message in (
        ("vocab_size", 99, "99 tokens and the model 101"),
        ("max_position_embeddings", 128, "sees 128 tokens"),
    ):
        config = helpers.TINY | {field: value}
        folder = helpers.write_folder(tmp_path / field, config, helpers.random_tensors(config))
        with pytest.raises(InvalidArgument, match=message):
            JaxDriver("cpu").load(request(tiny_folder, cache_folder, folder), helpers.ignore)
    with pytest.raises(InvalidArgument, match="set draft"):
        JaxDriver("cpu").load(request(tiny_folder, cache_folder, ""), helpers.ignore)

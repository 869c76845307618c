"""One answer: what is said, counted and told at the end."""

from __future__ import annotations

import pytest

from llmos.ipc.errors import IOFailure
from llmos.services.models.generation import Answer
from llmos.services.models.messages import Text
from llmos.services.scheduler.messages import Finished, Submit

SUBMIT = Submit(model="m", tokens=[1, 2, 3], max_tokens=10, stop=[0])
ENDED = Finished(
    task=4, reason="length", prompt_tokens=3, cached_tokens=1, completion_tokens=2, queued=0.1,
    first_token=0.2, total=0.3,
)  # fmt: skip


class Letters:
    """Token 1 is "a", 2 is "b" and so on."""

    def feed(self, tokens: list[int]) -> str:
        return "".join(chr(96 + token) for token in tokens)

    def finish(self) -> str:
        return "."


def answer(*stops: str) -> Answer:
    return Answer(SUBMIT, list(stops), Letters(), 100.0)


def test_tokens_become_text_with_a_running_count() -> None:
    each = answer()
    assert each.feed(0, [1, 2], 101.0) == Text("ab", 2)
    assert each.feed(2, [3], 101.0) == Text("c", 3)
    assert each.finish() == Text(".", 3)
    done = each.done(ENDED)
    assert (done.text, done.reason, done.usage) == ("abc.", "length", ENDED)


def test_the_stop_token_is_counted_but_not_shown() -> None:
    each = answer()
    assert each.feed(0, [1, 0], 101.0) == Text("a", 2)


def test_a_stop_string_ends_it_with_a_usage_of_its_own() -> None:
    each = answer("bc")
    assert each.feed(0, [1, 2], 101.5) == Text("a", 2)
    assert each.feed(2, [3, 4], 102.0) is None
    assert each.stopped
    assert each.finish() is None
    done = each.cut(103.0)
    assert (done.text, done.reason) == ("a", "stop")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 4)
    assert (done.usage.first_token, done.usage.total) == (1.5, 3.0)


def test_text_held_back_for_a_stop_string_that_never_came_is_shown_at_the_end() -> None:
    each = answer("bz")
    assert each.feed(0, [1, 2], 101.0) == Text("a", 2)
    assert each.finish() == Text("b.", 2)


def test_tokens_told_twice_are_shown_once_and_lost_ones_are_noticed() -> None:
    each = answer()
    each.feed(0, [1, 2], 101.0)
    assert each.feed(1, [2, 3], 101.0) == Text("c", 3)
    assert each.feed(0, [1], 101.0) is None
    with pytest.raises(IOFailure, match="lost"):
        each.feed(5, [1], 101.0)

"""Stop strings: what is shown depends on the text alone, never on the pieces it came in."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmos.services.models.stops import StopFinder

texts = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut before the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(texts, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_any_cutting_into_pieces_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stops)
    shown = "".join(finder.feed(piece) for piece in split(text, cuts))
    shown += finder.finish()
    assert (shown, finder.found) == expected(text, stops)


@given(texts, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = "".join(finder.feed(char) for char in text)
    if not finder.found:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_after_the_stop_string_is_never_shown() -> None:
    finder = StopFinder(["</s>"])
    assert finder.feed("ab<") == "ab"
    assert finder.feed("/s>cd") == ""
    assert finder.feed("more") == ""
    assert finder.finish() == ""

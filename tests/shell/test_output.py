"""Plain text that a person and a script can read."""

from __future__ import annotations

import pytest

from llmos.shell.output import count, mesh_words, seconds, table


def test_columns_are_as_wide_as_they_need_to_be() -> None:
    text = table(("NAME", "PID"), [("kernel", 7), ("a", 1234)], right=("PID",))
    assert text.split("\n") == ["NAME     PID", "kernel     7", "a       1234"]


def test_a_mesh_is_named_by_the_axes_that_spread_something() -> None:
    assert mesh_words({"data": 2, "tensor": 4, "expert": 1}) == "data 2 x tensor 4"
    assert mesh_words({}) == ""


def test_a_label_cannot_move_the_terminals_cursor() -> None:
    assert "\x1b" not in table(("LABEL",), [("\x1b[2Jgone",)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(-1, "-"), (0.04, "0.0s"), (59.94, "59.9s"), (61, "1m01s"), (3720, "1h02m"), (90000, "1d01h")],
)
def test_time_spans(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (134_515_008, "135M"), (8_030_000_000, "8.03B")])
def test_large_numbers(value: int, text: str) -> None:
    assert count(value) == text

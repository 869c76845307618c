"""Requests become tasks only if every value is in range and within the caller's rights."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.ipc.grant import Grant
from llmos.services.models.messages import ChatMessage, Generation
from llmos.services.models.requests import check_length, check_messages, template_message, to_submit

MODEL = LoadedModel(
    model="m", family="llama", parameters=1, weight_bytes=1, pages=10, page_tokens=16, page_bytes=1,
    slots=2, max_context=100, chunk_tokens=16, vocab_size=50, stop_tokens=[2], attention="xla",
)  # fmt: skip
GRANT = Grant(principal="p", tenant="t", models=["*"])


def submit(tokens: list[int] | None = None, grant: Grant = GRANT, **values: Any) -> Any:
    return to_submit(Generation(**values), tokens or [1, 2, 3], MODEL, grant, stop=[7])


def test_without_a_limit_it_generates_up_to_the_contexts_end() -> None:
    assert submit().max_tokens == 97
    assert submit(max_tokens=5).max_tokens == 5
    assert submit(grant=Grant(principal="p", tenant="t", max_tokens=9)).max_tokens == 9


def test_the_models_and_the_tokenizers_stop_tokens_end_it_unless_ignored() -> None:
    assert submit().stop == [2, 7]
    assert submit(ignore_eos=True).stop == []


def test_a_seed_is_kept_and_none_is_a_random_one() -> None:
    assert submit(seed=5).sampling.seed == 5
    assert submit(seed=-1).sampling.seed == (1 << 32) - 1
    assert len({submit().sampling.seed for _ in range(8)}) > 1


@pytest.mark.parametrize(("tokens", "asked", "total"), [(100, 0, 100), (101, 1, 101), (90, 11, 101)])
def test_what_exceeds_the_context_is_refused_with_both_numbers(tokens: int, asked: int, total: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        submit([1] * tokens, max_tokens=asked)
    assert caught.value.details == {"limit": 100, "tokens": total}
    assert str(total) in caught.value.message or str(asked) in caught.value.message


def test_pages_bound_the_context_too() -> None:
    small = LoadedModel(**{f: getattr(MODEL, f) for f in MODEL.__struct_fields__} | {"pages": 2})
    with pytest.raises(InvalidArgument) as caught:
        to_submit(Generation(), [1] * 40, small, GRANT)
    assert caught.value.details["limit"] == 32


def test_a_text_far_too_long_is_refused_before_it_is_tokenized() -> None:
    check_length("x" * 900, 10, MODEL)
    with pytest.raises(InvalidArgument) as caught:
        check_length("x" * 1000, 10, MODEL)
    assert caught.value.details == {"limit": 100, "tokens": 100}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"max_tokens": -1}, {"stop": [""]},
        {"stop": ["x" * 257]}, {"stop": ["x"] * 17}, {"logit_bias": {1: 101.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {50: 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": dict.fromkeys(range(1025), 0.0)},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        submit(**values)
    assert caught.value.details["param"] == next(iter(values))


@pytest.mark.parametrize("tokens", [[50], [-1]])
def test_token_ids_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(InvalidArgument, match="outside"):
        submit(tokens)
    with pytest.raises(InvalidArgument, match="empty"):
        to_submit(Generation(), [], MODEL, GRANT)


def test_rights_bound_the_band_and_the_length() -> None:
    grant = Grant(principal="p", tenant="t", band="batch", max_tokens=10)
    assert submit(grant=grant, band="batch", max_tokens=10)
    with pytest.raises(AccessDenied, match="band"):
        submit(grant=grant, band="interactive")
    with pytest.raises(AccessDenied, match="10"):
        submit(grant=grant, band="batch", max_tokens=11)


def test_messages_reach_the_template_with_text_for_content() -> None:
    assert template_message(ChatMessage("user")) == {"role": "user", "content": ""}
    assert template_message(ChatMessage("user", "x", name="n"))["name"] == "n"
    with pytest.raises(InvalidArgument):
        check_messages([])

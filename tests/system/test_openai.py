"""What a program sees that was written for the OpenAI API, through the official client, of a real model."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from llmos.services.manifest import DEFAULT_MODEL as MODEL
from llmos.services.security import tokens
from llmos.services.security.messages import Revoked, RevokeToken

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0, **more}


def error_of(raised: pytest.ExceptionInfo[Any]) -> dict[str, Any]:
    """The error object, which must have the four fields that OpenAI's have."""
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    return dict(body)


def test_models_are_listed(up: Any) -> None:
    client = up.openai()
    assert MODEL in {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).object == "model"


def test_a_chat_is_answered_sensibly_with_its_usage(up: Any) -> None:
    answer = up.openai().chat.completions.create(**ask())
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens > 5
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_in_pieces_with_its_usage_at_the_end(up: Any) -> None:
    client = up.openai()
    whole = client.chat.completions.create(**ask())
    chunks = list(client.chat.completions.create(**ask(stream=True, stream_options={"include_usage": True})))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_has_no_usage_unless_asked(up: Any) -> None:
    chunks = list(up.openai().chat.completions.create(**ask(stream=True)))
    assert all(chunk.usage is None for chunk in chunks)


def test_a_text_is_continued(up: Any) -> None:
    answer = up.openai().completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0
    )
    assert "Paris" in answer.choices[0].text


def test_a_stop_string_ends_the_answer_before_itself(up: Any) -> None:
    answer = up.openai().chat.completions.create(**ask(stop="Paris", max_tokens=32))
    assert "Paris" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(up: Any) -> None:
    asked = ask(temperature=1.0, top_p=0.95, seed=11)
    first, again = (up.openai().chat.completions.create(**asked) for _ in range(2))
    assert first.choices[0].message.content == again.choices[0].message.content


def test_a_wrong_model_is_not_found(up: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        up.openai().chat.completions.create(**ask(model="gpt-99"))
    error = error_of(raised)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]


def test_an_over_long_prompt_is_refused_with_the_limit(up: Any) -> None:
    long = [{"role": "user", "content": "one two three four " * 1000}]
    with pytest.raises(openai.BadRequestError) as raised:
        up.openai().chat.completions.create(**ask(messages=long))
    error = error_of(raised)
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("max_tokens", 0),
        ("n", 99),
        ("presence_penalty", 9),
        ("logit_bias", {"1": 1000}),
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "hi"}]),
        ("stop", [""]),
    ],
)
def test_a_bad_parameter_is_named(up: Any, parameter: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        up.openai().chat.completions.create(**ask(**{parameter: value}))
    error = error_of(raised)
    assert error["type"] == "invalid_request_error"
    assert parameter in f"{error['param']} {error['message']}"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": 7}', b"[" * 100_000, b'{"model": "m", "messages": '],
)  # fmt: skip
def test_bad_json_is_a_bad_request(up: Any, body: bytes) -> None:
    with up.http() as http:
        answer = http.post(
            "/v1/chat/completions", content=body, headers={"Authorization": f"Bearer {up.key}"}
        )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_an_unknown_path_is_an_error_of_the_same_shape(up: Any) -> None:
    with up.http() as http:
        answer = http.post("/v1/no/such", json={})
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_no_key_is_refused(up: Any) -> None:
    with up.http() as http:
        for path in ("/v1/models", "/v1/models/x"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.post("/v1/chat/completions", json=ask()).status_code == 401


@pytest.mark.parametrize("change", [lambda key: "sk-nonsense", lambda key: key[:-9] + "AAAAAAAA" + key[-1]])
def test_a_wrong_key_is_refused(up: Any, change: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        up.openai(change(up.key)).chat.completions.create(**ask())
    assert error_of(raised)["code"] == "invalid_api_key"


def test_a_revoked_key_is_refused_from_then_on(up: Any) -> None:
    key = up.mint("--ttl", "1h")
    client = up.openai(key)
    assert client.chat.completions.create(**ask()).usage.completion_tokens
    with up.client() as native:
        assert native.call("security.revoke", RevokeToken(token=key), Revoked).grants == 1
    with pytest.raises(openai.AuthenticationError) as raised:
        client.chat.completions.create(**ask())
    assert "revoked" in error_of(raised)["message"]
    assert up.openai().models.list().data, "other keys work on"


def test_revoking_a_key_ends_the_answers_it_is_reading(up: Any) -> None:
    key = up.mint("--ttl", "1h")
    stream = up.openai(key).completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    with up.client() as native:
        revoked = native.call("security.revoke", RevokeToken(token=key), Revoked)
    assert revoked.calls >= 1
    with pytest.raises(openai.APIError):
        list(stream)


def test_an_attenuated_key_has_less_rights(up: Any) -> None:
    only_other = up.openai(tokens.attenuate(up.key, models=["another-model"]))
    with pytest.raises((openai.PermissionDeniedError, openai.AuthenticationError)) as raised:
        only_other.chat.completions.create(**ask())
    error_of(raised)
    short = up.openai(tokens.attenuate(up.key, models=[MODEL], max_tokens=4))
    assert short.chat.completions.create(**ask(max_tokens=4)).usage.completion_tokens <= 4
    with pytest.raises(openai.PermissionDeniedError):
        short.chat.completions.create(**ask(max_tokens=5))


def test_a_key_for_one_model_is_minted_by_the_shell(up: Any) -> None:
    other = up.openai(up.mint("--models", "another-model"))
    assert other.models.list().data == []
    with pytest.raises(openai.PermissionDeniedError):
        other.chat.completions.create(**ask())


def test_an_expired_key_is_refused(up: Any) -> None:
    expired = tokens.attenuate(up.key, expires=int((time.time() - 1) * 1e6))
    with pytest.raises(openai.AuthenticationError):
        up.openai(expired).models.list()

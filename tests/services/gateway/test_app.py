"""The gateway through the official client and through plain HTTP."""

from __future__ import annotations

import json
import socket
from typing import Any

import openai
import pytest

ADA = {"Authorization": "Bearer key-ada"}


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def events(body: str) -> list[tuple[int, str]]:
    """The (id, data) of each event of a stream."""
    found = []
    for block in body.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((int(fields["id"]), fields["data"]))
    return found


def test_it_lists_models(world: Any) -> None:
    client = world.openai()
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").created == 7
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_it_chats(world: Any) -> None:
    answer = world.openai().chat.completions.create(**ask("hello there you"))
    assert answer.choices[0].message.content == "hello there you"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == 13
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_it_streams_with_usage_at_the_end(world: Any) -> None:
    chunks = list(
        world.openai().chat.completions.create(
            **ask("hello there you"), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello there you"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert len({chunk.id for chunk in chunks}) == 1


def test_events_carry_increasing_ids_and_end_with_done(world: Any) -> None:
    response = world.http().post("/v1/chat/completions", json=ask("a b", stream=True), headers=ADA)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [id for id, _ in found] == list(range(1, len(found) + 1))
    assert found[-1][1] == "[DONE]"
    assert not any("usage" in json.loads(data) for _, data in found[:-1])


def test_n_choices_run_with_seeds_of_their_own(world: Any) -> None:
    world.models.requests.clear()
    answer = world.openai().chat.completions.create(**ask("a b"), n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(r.generation.seed for r in world.models.requests) == [5, 6, 7]
    assert answer.usage.prompt_tokens == 10
    assert answer.usage.completion_tokens == 6
    chunks = list(world.openai().chat.completions.create(**ask("a b"), n=2, stream=True))
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "a b"
        assert mine[-1].finish_reason == "stop"


def test_it_completes_texts_and_token_ids(world: Any) -> None:
    client = world.openai()
    assert client.completions.create(model="echo", prompt="one two").choices[0].text == "one two"
    many = client.completions.create(model="echo", prompt=["a", "b"], n=2)
    assert [choice.text for choice in many.choices] == ["a", "a", "b", "b"]
    assert many.usage.prompt_tokens == 20
    world.models.requests.clear()
    client.completions.create(model="echo", prompt=[1, 2, 3])
    assert world.models.requests[0].prompt == [1, 2, 3]
    pieces = client.completions.create(model="echo", prompt="x y", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "x y"


def test_every_parameter_reaches_the_model(world: Any) -> None:
    answer = world.openai().chat.completions.create(
        **ask("dump"),
        temperature=0.5, top_p=0.9, seed=3, stop=["END"], max_completion_tokens=9,
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"5": -1},
        extra_body={
            "top_k": 4, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True, "priority": "batch"
        },
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content) == {
        "max_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.05,
        "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 3,
        "logit_bias": {"5": -1.0}, "stop": ["END"], "ignore_eos": True, "band": "batch", "stream": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ("long", openai.BadRequestError, "context_length_exceeded"),
        ("hot", openai.BadRequestError, None),
        ("busy", openai.RateLimitError, "rate_limit_exceeded"),
        ("later", openai.RateLimitError, "rate_limit_exceeded"),
        ("down", openai.InternalServerError, "service_unavailable"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_word_are_statuses(
    world: Any, text: str, error: type[openai.APIStatusError], code: str | None, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        list(world.openai().chat.completions.create(**ask(text), stream=stream))
    assert caught.value.code == code
    if (wait := {"busy": "1", "later": "13"}.get(text)) is not None:
        assert caught.value.response.headers["retry-after"] == wait


def test_a_wrong_model_is_not_found(world: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is: echo") as caught:
        world.openai().chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"


def test_an_error_in_the_middle_of_a_stream_is_an_event(world: Any) -> None:
    with pytest.raises(openai.APIError, match="failed to compute"):
        list(world.openai().chat.completions.create(**ask("well die"), stream=True))
    response = world.http().post("/v1/chat/completions", json=ask("well die", stream=True), headers=ADA)
    assert "error" in json.loads(events(response.text)[-1][1])


def test_keys_are_asked_for_and_checked(world: Any) -> None:
    assert world.http().get("/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError) as caught:
        world.openai("nonsense").models.list()
    assert caught.value.code == "invalid_api_key"
    poor = world.openai("key-poor")
    assert len(poor.models.list().data) == 1
    with pytest.raises(openai.PermissionDeniedError):
        poor.chat.completions.create(**ask("hi"))


def test_a_key_is_presented_once(world: Any) -> None:
    client = world.openai("key-once")
    for _ in range(3):
        client.models.list()
    assert world.security.asked.count("key-once") == 1


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"{", "JSON"),
        (b'{"model": "echo"}', "messages"),
        (b'{"model": "echo", "messages": []}', "messages"),
        (b'{"model": "echo", "messages": [{"role": "x", "content": ""}]}', "role"),
        (b"\xff\xfe", "JSON"),
        (json.dumps(ask("x", logprobs=True)).encode(), "logprobs"),
        (json.dumps(ask("x", tools=[{"type": "function"}])).encode(), "tools"),
        (json.dumps(ask("x", response_format={"type": "json_object"})).encode(), "response_format"),
        (json.dumps(ask("x", n=9)).encode(), "n must"),
        (json.dumps(ask("x", max_tokens=0)).encode(), "max_tokens"),
        (json.dumps(ask("x", temperature="hot")).encode(), "temperature"),
        (json.dumps(ask("x", made_up=1)).encode(), "made_up"),
        (json.dumps(ask("x", priority="root")).encode(), "priority"),
    ],
)
def test_bad_requests_say_what_is_wrong(world: Any, body: bytes, what: str) -> None:
    response = world.http().post("/v1/chat/completions", content=body, headers=ADA)
    assert response.status_code == 400
    assert what in response.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_accepted(world: Any) -> None:
    body = ask("x", tools=[], logprobs=False, response_format={"type": "text"}, user="me", n=None, stop=None)
    assert world.http().post("/v1/chat/completions", json=body, headers=ADA).status_code == 200
    parts = [{"type": "text", "text": "from "}, {"type": "text", "text": "parts"}]
    body = {"model": "echo", "messages": [{"role": "developer", "content": parts}]}
    answer = world.http().post("/v1/chat/completions", json=body, headers=ADA).json()
    assert answer["choices"][0]["message"]["content"] == "from parts"


def test_a_body_that_is_too_large_is_refused(world: Any) -> None:
    http = world.http()
    assert http.post("/v1/chat/completions", json=ask("x" * 200_000), headers=ADA).status_code == 413

    def pieces() -> Any:
        for _ in range(300):
            yield b"x" * 1000

    assert http.post("/v1/chat/completions", content=pieces(), headers=ADA).status_code == 413


def test_an_unknown_path_is_an_error_of_the_same_shape(world: Any) -> None:
    assert "error" in world.http().get("/v1/none").json()
    assert world.http().get("/v1/chat/completions").status_code == 405
    assert "/v1" in world.http().get("/").text


def test_the_deadline_of_the_request_is_kept(world: Any) -> None:
    http = world.http()
    slow = {**ADA, "X-Request-Timeout": "0.2"}
    assert http.post("/v1/chat/completions", json=ask("hang"), headers=slow).status_code == 504
    wrong = {**ADA, "X-Request-Timeout": "soon"}
    assert http.post("/v1/chat/completions", json=ask("x"), headers=wrong).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_leaving_withdraws_the_generation(world: Any, stream: bool, n: int) -> None:
    world.models.canceled.clear()
    host, port = world.url.removeprefix("http://").rsplit(":", 1)
    body = json.dumps(ask("hang", stream=stream, n=n)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-ada\r\nContent-Length: {len(body)}\r\n\r\n"  # noqa: E501
    began = len(world.models.requests)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            assert b"200 OK" in connection.recv(100)
        else:
            from tests.conftest import wait_until

            wait_until(lambda: len(world.models.requests) == began + n)
    assert world.models.canceled.wait(5)


def test_health_is_the_monitors_word(world: Any) -> None:
    from llmos.services.monitor.messages import Health

    good = world.http().get("/healthz")
    assert (good.status_code, good.json()) == (200, {"ok": True, "reasons": []})
    world.monitor.health = Health(ok=False, reasons=["scheduler: no step for 40 s"])
    try:
        bad = world.http().get("/healthz")
    finally:
        world.monitor.health = Health(ok=True, reasons=[])
    assert (bad.status_code, bad.json()["reasons"]) == (503, ["scheduler: no step for 40 s"])

"""Embeddings through the official client, and reranking as its clients write it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from llmos.services.models.messages import Embed, Rerank
from tests.services.gateway.conftest import World


def embed(world: World, **body: Any) -> Any:
    return world.openai().embeddings.create(**{"model": "echo", "input": "abc", **body})


def test_a_text_becomes_a_vector_with_its_usage(world: World) -> None:
    answer = embed(world)  # the client asks for base64 and unpacks it
    assert [(item.index, item.object, item.embedding) for item in answer.data] == [
        (0, "embedding", [3.0, 0.5])
    ]
    assert (answer.model, answer.object) == ("echo", "list")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_both_encodings_say_the_same(world: World, encoding: str) -> None:
    answer = embed(world, input=["a", "abcd"], encoding_format=encoding)
    if encoding == "float":
        assert [item.embedding for item in answer.data] == [[1.0, 0.5], [4.0, 0.5]]
    else:  # asked for by name, the client leaves it as it is: "AACAPwAAAD8="
        assert answer.data[0].embedding == "AACAPwAAAD8="


@pytest.mark.parametrize(
    ("input", "expected"),
    [("abc", ["abc"]), (["a", "b"], ["a", "b"]), ([1, 2, 3], [[1, 2, 3]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_input_is_a_text_token_ids_or_a_list_of_either(world: World, input: Any, expected: Any) -> None:
    embed(world, input=input, extra_body={"truncate": True, "priority": "batch"})
    assert world.models.encodes[-1] == Embed(model="echo", input=expected, truncate=True, band="batch")


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": 7}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 1}, "dimensions"),
        ({"extra_body": {"wat": 1}}, "wat"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(world: World, body: Any, parameter: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(world, **body)
    error: Any = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert parameter in f"{error['param']} {error['message']}"


def test_dimensions_that_the_model_has_are_accepted(world: World) -> None:
    assert len(embed(world, dimensions=2).data[0].embedding) == 2


def test_errors_are_those_of_other_endpoints(world: World) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(world, input="long")
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError):
        embed(world, input="busy")
    with pytest.raises(openai.PermissionDeniedError):
        world.openai("key-poor").embeddings.create(model="echo", input="a")
    with pytest.raises(openai.AuthenticationError):
        world.openai("nonsense").embeddings.create(model="echo", input="a")


def rerank(world: World, key: str = "key-ada", **body: Any) -> Any:
    asked = {"model": "echo", "query": "q", "documents": ["a", "b", {"text": "c"}], **body}
    return world.http().post("/v1/rerank", json=asked, headers={"Authorization": f"Bearer {key}"})


def test_documents_are_ranked(world: World) -> None:
    answer = rerank(world).json()
    assert answer["results"] == [
        {"index": 2, "relevance_score": 0.2}, {"index": 1, "relevance_score": 0.1},
        {"index": 0, "relevance_score": 0.0},
    ]  # fmt: skip
    assert answer["usage"]["total_tokens"] == 9
    assert world.models.encodes[-1] == Rerank(model="echo", query="q", documents=["a", "b", "c"])


def test_the_best_alone_come_with_their_text_if_asked(world: World) -> None:
    answer = rerank(world, top_n=1, return_documents=True).json()
    assert answer["results"] == [{"index": 2, "relevance_score": 0.2, "document": {"text": "c"}}]


@pytest.mark.parametrize(("body", "parameter"), [({"top_n": 0}, "top_n"), ({"documents": "a"}, "documents")])
def test_a_bad_ranking_is_refused_by_name(world: World, body: Any, parameter: str) -> None:
    answer = rerank(world, **body)
    assert answer.status_code == 400
    assert parameter in str(answer.json()["error"])
    assert rerank(world, key="nonsense").status_code == 401

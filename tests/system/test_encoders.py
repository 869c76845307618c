"""The real embedding model in the whole system, beside the language model on one driver."""

from __future__ import annotations

import json
import math
import threading
from operator import mul
from pathlib import Path
from typing import Any

import openai
import pytest

from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models.messages import ModelList, TokenIds, Tokenize
from tests.system.conftest import EMBEDDER

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(600)]

# What the BertModel of transformers computes of three texts in float32, averaged over tokens and normalised.
REFERENCE = json.loads(
    (Path(__file__).parents[1] / "data" / "reference" / "all-minilm-l6-v2.json").read_text()
)
TEXTS = [entry["text"] for entry in REFERENCE]


@pytest.fixture
def embedder(up: Any) -> Any:
    with up.client() as client:
        names = [line.name for line in client.call("models.list", None, ModelList).models]
    if EMBEDDER not in names:
        pytest.skip(f"the model is not here: llmos pull {EMBEDDER}, or set LLMOS_TEST_EMBEDDER")
    return up


def embed(up: Any, texts: Any, **more: Any) -> list[list[float]]:
    answer = up.openai().embeddings.create(model=EMBEDDER, input=texts, **more)
    return [item.embedding for item in answer.data]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(map(mul, a, b)) / math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))


def test_vectors_are_those_of_the_reference(embedder: Any) -> None:
    for found, expected in zip(embed(embedder, TEXTS), REFERENCE, strict=True):
        assert cosine(found, expected["embedding"]) > 0.9999
        assert found == pytest.approx(expected["embedding"], abs=1e-5)
        assert sum(map(mul, found, found)) == pytest.approx(1, abs=1e-5)


def test_tokens_are_those_of_the_reference(embedder: Any) -> None:
    with embedder.client() as client:
        for entry in REFERENCE:
            found = client.call("models.tokenize", Tokenize(EMBEDDER, entry["text"]), TokenIds)
            assert found.tokens == entry["tokens"]
    by_ids = embed(embedder, [entry["tokens"] for entry in REFERENCE], encoding_format="float")
    for found, text in zip(by_ids, embed(embedder, TEXTS), strict=True):
        assert found == pytest.approx(text, abs=1e-6)


def test_what_means_the_like_is_closer(embedder: Any) -> None:
    cat, kitten, bank = embed(embedder, TEXTS)
    assert cosine(cat, kitten) > cosine(cat, bank) + 0.2
    request = {"model": EMBEDDER, "query": "a pet on the floor", "documents": TEXTS, "top_n": 2}
    with embedder.http() as http:
        headers = {"Authorization": f"Bearer {embedder.key}"}
        answer = http.post("/v1/rerank", json=request, headers=headers).json()
    assert {result["index"] for result in answer["results"]} == {0, 1}


def test_a_long_batch_and_a_generation_go_on_beside_each_other(embedder: Any) -> None:
    def generate() -> str:
        made = embedder.openai().completions.create(
            model=DEFAULT_MODEL, prompt="Once upon a time", max_tokens=24, temperature=0
        )
        return str(made.choices[0].text)

    alone, texts = generate(), [f"{text} Number {i}." for i in range(6) for text in TEXTS]
    vectors: list[list[float]] = []
    batch = threading.Thread(
        target=lambda: vectors.extend(embed(embedder, texts, extra_body={"priority": "batch"}))
    )
    batch.start()
    assert generate() == alone
    assert len(embed(embedder, "in between")) == 1
    batch.join(120)
    assert len(vectors) == len(texts)
    assert cosine(vectors[-1], embed(embedder, texts[-1])[0]) > 0.9999


def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut(embedder: Any) -> None:
    long = "one two three four " * 100
    with pytest.raises(openai.BadRequestError) as raised:
        embed(embedder, long)
    assert raised.value.code == "context_length_exceeded"
    assert "256" in str(raised.value)
    assert len(embed(embedder, long, extra_body={"truncate": True})[0]) == 384


def test_each_model_says_what_it_is_not_for(embedder: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="encoder"):
        embedder.openai().completions.create(model=EMBEDDER, prompt="hello", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="generates text"):
        embedder.openai().embeddings.create(model=DEFAULT_MODEL, input="hello")
    with pytest.raises(openai.PermissionDeniedError):
        embedder.openai(embedder.mint("--models", DEFAULT_MODEL)).embeddings.create(model=EMBEDDER, input="a")


def test_the_command_prints_a_vector_on_a_line_for_each_text(embedder: Any) -> None:
    done = embedder.llmos("embed", EMBEDDER, *TEXTS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [cosine(row, entry["embedding"]) > 0.9999 for row, entry in zip(found, REFERENCE)] == [True] * 3

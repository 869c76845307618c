"""Embedding, reranking and classifying, from texts to numbers: the real scheduler, the null driver."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmos.drivers.null.driver import NullDriver, vector
from llmos.drivers.sdk.driver import PendingEncoding, Progress
from llmos.drivers.sdk.messages import EncodedStep, EncodeStep, LoadedModel, LoadRequest
from llmos.drivers.sdk.server import DriverServer
from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, Busy, InvalidArgument, LLMOSError, NotFound
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.models import scores
from llmos.services.models.messages import (
    Chat,
    ChatMessage,
    Classified,
    Classify,
    Embed,
    Embedded,
    ModelList,
    Ranked,
    Rerank,
)
from llmos.services.models.server import ModelsServer
from llmos.services.scheduler.messages import Encode, Encoded, Rows, SchedulerStats, Submit
from tests.conftest import System, wait_until

CALLS = [f"models.{verb}" for verb in ("embed", "rerank", "classify", "list", "chat")]
CALLS += ["scheduler.encode", "scheduler.submit", "scheduler.stats", "scheduler.tasks", "scheduler.kill"]
GRANTS = {
    "models": Grant(
        principal="models", tenant="system", serves="models",
        calls=["scheduler.*", "driver.d0.load", "driver.d0.unload"],
    ),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", "driver.d0.*"]
    ),
    "driver.d0": Grant(principal="driver.d0", tenant="system", serves="driver.d0"),
    "user": Grant(
        principal="user", tenant="t", models=["*"], band="realtime", calls=[*CALLS, "kernel.names"]
    ),
    "poor": Grant(
        principal="poor", tenant="p", models=["vectors"], band="batch", calls=CALLS, tokens_per_minute=20
    ),
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##b"]
LABELS = {"vectors": [], "relevance": ["LABEL_0"], "moods": ["sad", "glad", "none"]}
BAD = WORDS.index("[MASK]")  # a token that the device cannot bear


class Encoders(NullDriver):
    """Encoders by name: vectors as the null driver makes them, or as many logits as there are labels."""

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        self._encoder = request.model
        loaded = super().load(request, progress)
        labels = LABELS[request.model]
        loaded = msgspec.structs.replace(
            loaded, max_context=8, chunk_tokens=64, labels=labels, width=len(labels) or 4
        )
        self._models[request.model] = loaded
        return loaded

    def encode(self, request: EncodeStep) -> PendingEncoding:
        wait, width = super().encode(request), self._models[request.model].width
        failing = any(BAD in text for text in request.texts)

        def cut() -> EncodedStep:
            whole = scores.unpack(wait().rows, 4)
            if failing:
                raise InvalidArgument("the device cannot bear this")
            rows = b"".join(struct.pack(f"<{width}f", *row[:width]) for row in whole)
            return EncodedStep(rows, width, 1)

        return cut


class World(System):
    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="llmos-t")), GRANTS)
        folder = self.run / "encoder"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        self.write_manifest(
            Manifest(
                drivers=[DriverSpec(name="d0", kind="null")],
                models=[ModelSpec(name=name, driver="d0", source=str(folder)) for name in LABELS],
            )
        )
        self.kernel()
        self.serve(ModelsServer(self.run, self.run / "cache"))
        self.spawn("scheduler", "llmos.services.scheduler")
        self.driver = self.serve(DriverServer("d0", Encoders(), self.run))
        self.user = self.client()
        wait_until(self.ready, what="the encoders")

    def ready(self) -> bool:
        lines = self.user.call("models.list", None, ModelList).models
        return all((line.state, line.kind) == ("ready", "encoder") for line in lines)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()
    shutil.rmtree(world.run, ignore_errors=True)


def ids(text: str) -> list[int]:
    return [2, *(WORDS.index(word) for word in text.split()), 3]


def embed(client: Client, *texts: str | list[int], **more: Any) -> list[tuple[float, ...]]:
    made = client.call("models.embed", Embed(model="vectors", input=list(texts), **more), Embedded)
    assert (made.model, made.width) == ("vectors", 4)
    return scores.unpack(made.vectors, made.width)


def test_each_text_becomes_the_vector_of_its_tokens(world: World) -> None:
    texts = ["a b", "A  B", "ab", "a b c d e f"]
    found = embed(world.user, *texts)
    expected = [ids("a b"), ids("a b"), [2, 5, 13, 3], ids("a b c d e f")]
    assert found == [tuple(vector(tokens, [])) for tokens in expected]


def test_token_ids_are_taken_as_they_are(world: World) -> None:
    assert embed(world.user, [5, 6], "a") == [tuple(vector([5, 6], [])), tuple(vector(ids("a"), []))]


def test_many_texts_come_back_in_their_order_and_are_counted(world: World) -> None:
    texts: list[str | list[int]] = [[5 + i % 8] * (1 + i % 8) for i in range(300)]
    made = world.user.call("models.embed", Embed(model="vectors", input=texts), Embedded)
    assert scores.unpack(made.vectors, 4) == [tuple(vector(list(text), [])) for text in texts]  # type: ignore[arg-type]
    assert made.tokens == sum(map(len, texts))


def test_a_text_that_is_too_long_is_refused_or_cut_if_asked(world: World) -> None:
    with pytest.raises(InvalidArgument, match="text 1 has 9 tokens; the model takes 8") as caught:
        embed(world.user, "a", "a b c d e f g")
    assert (caught.value.details["limit"], caught.value.details["tokens"]) == (8, 9)
    assert embed(world.user, "a b c d e f g", truncate=True) == embed(world.user, "a b c d e f")
    assert embed(world.user, [5] * 9, truncate=True) == embed(world.user, [5] * 8)


def test_an_embedding_model_ranks_by_the_angle_of_vectors(world: World) -> None:
    asked = Rerank(model="vectors", query="a b", documents=["h h h h", "a b", "g"], top_n=2)
    made = world.user.call("models.rerank", asked, Ranked)
    (best, score), _ = made.results
    assert best == 1
    assert score == pytest.approx(1)


def test_a_cross_encoder_reads_query_and_document_together(world: World) -> None:
    asked = Rerank(model="relevance", query="a", documents=["b", "b c d", "", "b c d e f g h"], truncate=True)
    made = world.user.call("models.rerank", asked, Ranked)
    # Its logit is the number of tokens: [CLS] a [SEP] document [SEP], at most 8.
    assert made.results == [
        (3, scores.sigmoid(8)),
        (1, scores.sigmoid(7)),
        (0, scores.sigmoid(5)),
        (2, scores.sigmoid(4)),
    ]
    assert made.tokens == 24


def test_texts_and_pairs_are_classified_by_label(world: World) -> None:
    made = world.user.call("models.classify", Classify(model="moods", input=["a", "b"]), Classified)
    assert made.labels == ["sad", "glad", "none"]
    assert [sum(row) for row in made.scores] == pytest.approx([1, 1])
    assert all(row[2] > row[1] > row[0] for row in made.scores)
    pairs = Classify(model="moods", input=["a"], seconds=["b"])
    assert world.user.call("models.classify", pairs, Classified).tokens == 5


@pytest.mark.parametrize(
    ("method", "request_", "error", "message"),
    [
        ("embed", Embed(model="none", input=["a"]), NotFound, "there is: vectors"),
        ("embed", Embed(model="vectors", input=[]), InvalidArgument, "1 to 4096 texts"),
        ("embed", Embed(model="vectors", input=["a", ""]), InvalidArgument, "text 1 is empty"),
        ("embed", Embed(model="vectors", input=[[999]]), InvalidArgument, "outside 0 to 255"),
        ("embed", Embed(model="vectors", input=["a" * (5 << 20)]), InvalidArgument, "characters"),
        ("embed", Embed(model="moods", input=["a"]), InvalidArgument, "use models.classify"),
        ("rerank", Rerank(model="moods", query="a", documents=["b"]), InvalidArgument, "3 labels"),
        ("rerank", Rerank(model="vectors", query="a", documents=[]), InvalidArgument, "no documents"),
        ("rerank", Rerank(model="vectors", query="a", documents=["b"], top_n=-1), InvalidArgument, "top_n"),
        ("classify", Classify(model="vectors", input=["a"]), InvalidArgument, "use models.embed"),
        ("classify", Classify(model="moods", input=["a"], seconds=["a", "b"]), InvalidArgument, "paired"),
        ("chat", Chat(model="vectors", messages=[ChatMessage("user", "a")]), InvalidArgument, "encoder"),
    ],
)
def test_wrong_requests_say_what_is_wrong(
    world: World, method: str, request_: Any, error: type[LLMOSError], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.user.call(f"models.{method}", request_)


def test_rights_and_quotas_are_those_of_the_caller(world: World) -> None:
    poor = world.client("poor")
    with pytest.raises(AccessDenied, match="batch"):
        embed(poor, "a")
    with pytest.raises(AccessDenied, match="moods"):
        poor.call("models.classify", Classify(model="moods", input=["a"], band="batch"))
    assert embed(poor, "a b c d e f", band="batch")
    assert embed(poor, "a b c d e f", band="batch")
    with pytest.raises(Busy, match="20 tokens_per_minute"):
        embed(poor, "a b c d e f", band="batch")
    with pytest.raises(AccessDenied, match="may take 24"):
        embed(poor, *["a b c d e f"] * 3, band="batch")


def test_what_the_device_fails_on_ends_that_request_alone(world: World) -> None:
    with pytest.raises(LLMOSError, match="cannot bear") as caught:
        embed(world.user, [BAD])
    assert caught.value.code == "EIO"
    assert embed(world.user, [5])


def test_the_scheduler_counts_the_work_and_says_what_is_no_decoder(world: World) -> None:
    before = world.user.call("scheduler.stats", None, SchedulerStats)
    request = Encode(model="vectors", texts=[[5, 6], [6]])
    *chunks, end = world.user.stream("scheduler.encode", request, Rows, Encoded)
    assert sorted(index for chunk in chunks for index in chunk.indices) == [0, 1]
    assert end.tokens == 3
    after = world.user.call("scheduler.stats", None, SchedulerStats)
    assert (after.tokens - before.tokens, after.finished - before.finished) == (3, 1)
    assert (after.running, after.waiting) == (0, 0)
    assert after.served["t"] >= before.served["t"] + 3
    with pytest.raises(InvalidArgument, match="encoder"):
        world.user.call("scheduler.submit", Submit(model="vectors", tokens=[1], max_tokens=1))

"""Requests for encoders: tokenized and scored beside the loop, computed by the scheduler's drivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from llmos.drivers.sdk.checks import TEXT_LIMIT
from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc import calls, codec, limits
from llmos.ipc.background import Background
from llmos.ipc.errors import InvalidArgument, IOFailure, LLMOSError
from llmos.ipc.grant import Band
from llmos.ipc.header import Kind
from llmos.ipc.server import Incoming, Server
from llmos.services.models import scores, texts
from llmos.services.models.hosting import Model
from llmos.services.models.messages import Classified, Classify, Embed, Embedded, Ranked, Rerank
from llmos.services.models.texts import Input, Tokens
from llmos.services.scheduler.messages import Encode, Encoded, Rows

MAX_CHARS = 4 << 20
MAX_REPLY = limits.BODY_BYTES - (64 << 10)

Finish = Callable[[bytes, int], object]
"""(all rows, tokens) -> the reply."""


class Encodings:
    """Answers embed, rerank and classify for models that are ready."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._background = Background(server)

    def close(self) -> None:
        self._background.close()

    def embed(self, request: Embed, model: Model, call: Incoming) -> None:
        loaded = _encoder(model, labels=False)
        if len(request.input) * loaded.width * 4 > MAX_REPLY:
            raise InvalidArgument(
                f"{len(request.input)} vectors of {loaded.width} numbers exceed an answer: send "
                f"{MAX_REPLY // (loaded.width * 4)} texts at most",
                param="input",
            )

        def finish(rows: bytes, tokens: int) -> Embedded:
            return Embedded(model=loaded.model, width=loaded.width, vectors=rows, tokens=tokens)

        self._begin(call, model, request.input, finish, truncate=request.truncate, band=request.band)

    def rerank(self, request: Rerank, model: Model, call: Incoming) -> None:
        """By a cross-encoder, which reads query and document together, or by the angle of two vectors."""
        loaded = _encoder(model)
        if request.top_n < 0:
            raise InvalidArgument(f"top_n must be 0 or more, not {request.top_n}", param="top_n")
        if len(loaded.labels) > 1:
            raise InvalidArgument(f"{loaded.model} has {len(loaded.labels)} labels: it classifies, not ranks")
        if not request.documents:
            raise InvalidArgument("there are no documents to rank", param="documents")
        begin = partial(self._begin, call, model, truncate=request.truncate, band=request.band)

        def finish(rows: bytes, tokens: int) -> Ranked:
            found = scores.unpack(rows, loaded.width)
            if loaded.labels:
                relevance = [scores.sigmoid(row[0]) for row in found]
            else:
                relevance = [scores.cosine(found[0], row) for row in found[1:]]
            results = scores.ranked(relevance, request.top_n)
            return Ranked(model=loaded.model, results=results, tokens=tokens)

        if loaded.labels:
            queries = [request.query] * len(request.documents)
            begin(inputs=queries, finish=finish, seconds=request.documents)
        else:
            begin(inputs=[request.query, *request.documents], finish=finish)

    def classify(self, request: Classify, model: Model, call: Incoming) -> None:
        loaded = _encoder(model, labels=True)
        if request.seconds and len(request.seconds) != len(request.input):
            raise InvalidArgument(
                f"{len(request.input)} texts cannot be paired with {len(request.seconds)} seconds",
                param="seconds",
            )

        def finish(rows: bytes, tokens: int) -> Classified:
            found = scores.unpack(rows, loaded.width)
            made = [scores.probabilities(row, loaded.exclusive) for row in found]
            return Classified(model=loaded.model, labels=loaded.labels, scores=made, tokens=tokens)

        self._begin(
            call, model, request.input, finish,
            seconds=request.seconds, truncate=request.truncate, band=request.band,
        )  # fmt: skip

    def _begin(
        self,
        call: Incoming,
        model: Model,
        inputs: Sequence[Input],
        finish: Finish,
        *,
        seconds: Sequence[str] = (),
        truncate: bool,
        band: Band,
    ) -> None:
        """Tokenize on the thread, then submit."""
        assert model.loaded is not None
        assert model.tokenizer is not None
        _check_size(inputs, seconds)
        encode = partial(texts.encode, model.tokenizer, inputs, model.loaded.max_context)

        def tokenized(future: Future[list[Tokens]]) -> None:
            if call.key not in self._server.serving:
                return  # withdrawn meanwhile
            try:
                self._submit(call, model.spec.name, future.result(), finish, band)
            except LLMOSError as error:
                call.fail(error)

        self._background.run(lambda: encode(seconds=seconds, truncate=truncate), tokenized)

    def _submit(self, call: Incoming, model: str, tokens: list[Tokens], finish: Finish, band: Band) -> None:
        typed = any(any(text.types) for text in tokens)
        body = Encode(
            model=model,
            texts=[text.ids for text in tokens],
            types=[text.types for text in tokens] if typed else [],
            band=band,
            label=call.head.method,
        )
        rows: dict[int, bytes] = {}

        def answered(answer: calls.Answer) -> None:
            if answer.error is not None:
                call.fail(answer.error)
            elif answer.kind == Kind.CHUNK:
                part = codec.decode(answer.body, Rows)
                size = len(part.data) // len(part.indices)
                rows.update({n: part.data[i * size : (i + 1) * size] for i, n in enumerate(part.indices)})
            elif len(rows) != len(tokens):
                call.fail(IOFailure(f"{len(tokens) - len(rows)} of {len(tokens)} texts were lost"))
            else:
                whole = b"".join(rows[number] for number in range(len(tokens)))
                count = codec.decode(answer.body, Encoded).tokens
                self._background.run(lambda: finish(whole, count), lambda made: call.reply(made.result()))

        id = self._server.call("scheduler.encode", body, answered, acting=call)
        call.on_cancel = lambda: self._server.data.cancel(id)


def _encoder(model: Model, labels: bool | None = None) -> LoadedModel:
    """A model that is an encoder, with or without ``labels`` if that matters."""
    loaded = model.loaded
    assert loaded is not None
    if loaded.kind != "encoder":
        raise InvalidArgument(f"{loaded.model} generates text: it does not embed, rank or classify")
    if labels is not None and bool(loaded.labels) != labels:
        use = "it classifies: use models.classify" if loaded.labels else "it embeds: use models.embed"
        raise InvalidArgument(f"{loaded.model} does not do this; {use}")
    return loaded


def _check_size(inputs: Sequence[Input], seconds: Sequence[str]) -> None:
    """Refuse what would keep the tokenizer busy for long."""
    if not 0 < len(inputs) <= TEXT_LIMIT:
        raise InvalidArgument(f"a request has 1 to {TEXT_LIMIT} texts, not {len(inputs)}", param="input")
    size = sum(map(len, inputs)) + sum(map(len, seconds))
    if size > MAX_CHARS:
        raise InvalidArgument(f"{size} characters in one request exceed {MAX_CHARS}", param="input")
    for number, text in enumerate(inputs):
        if not text:
            raise InvalidArgument(f"text {number} is empty", param="input")

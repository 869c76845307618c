"""The bodies of /v1/embeddings (as OpenAI has them) and /v1/rerank (as Jina and Cohere do). Pure."""

from __future__ import annotations

import base64
import secrets
import struct
from typing import Any

import msgspec

from llmos.ipc.grant import Band
from llmos.services.gateway.errors import ApiError
from llmos.services.models.messages import Embed, Embedded, Ranked, Rerank

MAX_INPUTS = 2048


class EmbeddingsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings. None stands for "not given"."""

    model: str

    # A text, or token ids; or a list of either.
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None

    # Extensions.
    truncate: bool | None = None
    priority: Band | None = None

    # Accepted, and without effect here.
    user: Any = None


class Document(msgspec.Struct):
    """A document as Cohere writes it; its other fields are not read."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/rerank."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None

    # Extensions.
    truncate: bool | None = None
    priority: Band | None = None

    # Accepted, and without effect here.
    user: Any = None


def to_embed(request: EmbeddingsRequest) -> Embed:
    """The message for models; ApiError 400 for what is not supported."""
    if request.encoding_format not in (None, "float", "base64"):
        raise ApiError(400, "encoding_format must be float or base64", param="encoding_format")
    inputs = one_or_many(request.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs are over {MAX_INPUTS}", param="input")
    return Embed(
        model=request.model,
        input=inputs,
        truncate=bool(request.truncate),
        band=request.priority or "interactive",
    )


def embeddings(request: EmbeddingsRequest, made: Embedded) -> bytes:
    """The body of the answer; ApiError 400 where another number of dimensions was asked for."""
    if request.dimensions not in (None, made.width):
        raise ApiError(
            400,
            f"dimensions must be {made.width}, all that {made.model} makes, or left out",
            param="dimensions",
        )
    size = 4 * made.width
    rows = [made.vectors[at : at + size] for at in range(0, len(made.vectors), size)]
    write = _base64 if request.encoding_format == "base64" else _floats
    data = [{"object": "embedding", "index": i, "embedding": write(row)} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": made.model, "usage": usage})


def _base64(row: bytes) -> str:
    return base64.b64encode(row).decode()


def _floats(row: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(row) // 4}f", row)


def to_rerank(request: RerankRequest) -> Rerank:
    """The message for models."""
    if request.top_n is not None and request.top_n < 1:
        raise ApiError(400, f"top_n must be at least 1, not {request.top_n}", param="top_n")
    return Rerank(
        model=request.model,
        query=request.query,
        documents=_texts(request),
        top_n=request.top_n or 0,
        truncate=bool(request.truncate),
        band=request.priority or "interactive",
    )


def ranking(request: RerankRequest, made: Ranked) -> bytes:
    """The body of the answer."""
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": score} for i, score in made.results]
    if request.return_documents:
        texts = _texts(request)
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    body = {"id": f"rerank-{secrets.token_hex(12)}", "model": made.model, "results": results, "usage": usage}
    return msgspec.json.encode(body)


def _texts(request: RerankRequest) -> list[str]:
    return [document if isinstance(document, str) else document.text for document in request.documents]


def one_or_many(value: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    if isinstance(value, str):
        return [value]
    tokens = [item for item in value if isinstance(item, int)]
    others: list[str | list[int]] = [item for item in value if not isinstance(item, int)]
    if not value or (tokens and others):
        raise ApiError(400, f"{name} must be a text, token ids, or a list of either", param=name)
    return [tokens] if tokens else others

"""The endpoints."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llmos.ipc.aio import AsyncClient
from llmos.ipc.errors import AccessDenied, LLMOSError, NotFound
from llmos.services.gateway import choices, encoders, translate
from llmos.services.gateway.choices import Batch
from llmos.services.gateway.errors import ApiError, from_error
from llmos.services.gateway.events import events
from llmos.services.gateway.keys import KeyRing, read_key
from llmos.services.gateway.replies import Shape
from llmos.services.gateway.responses import EventStream, Json, failure, read_body, until_gone
from llmos.services.gateway.schema import ChatRequest, CompletionRequest
from llmos.services.models.messages import Chat, Complete, Done, Embedded, ModelLine, ModelList, Ranked
from llmos.services.monitor.messages import Snapshot

T = TypeVar("T")

HEALTH_SECONDS = 2.0
LIST_SECONDS = 10.0
MAX_AGE_SECONDS = 10.0
POINTER = "LLM OS: an OpenAI-compatible API is at /v1, health at /healthz.\n"


class Gateway:
    """Answers requests with what ``models`` answers, under the capability that each of them brings."""

    def __init__(self, client: AsyncClient, max_body: int) -> None:
        self._client = client
        self._max_body = max_body
        self._keys = KeyRing(client)
        self.progress = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/", self._root),
            Route("/healthz", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/rerank", self._rerank, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[..., Awaitable[Response]]] = {
            ApiError: _on_api_error,
            LLMOSError: _on_system_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_gone,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _root(self, request: Request) -> Response:
        return PlainTextResponse(POINTER)

    async def _health(self, request: Request) -> Response:
        """Whether the system makes progress: the monitor's word, if it is a fresh one."""
        try:
            seen = await self._client.call("monitor.snapshot", None, Snapshot, timeout=HEALTH_SECONDS)
        except LLMOSError as error:
            return Json({"ok": False, "reasons": [f"monitor: {error}"]}, status_code=503)
        reasons = list(seen.health.reasons)
        if seen.age > MAX_AGE_SECONDS:
            reasons.append(f"the monitor has seen nothing for {seen.age:.0f} s")
        ok = seen.health.ok and seen.age <= MAX_AGE_SECONDS
        return Json({"ok": ok, "reasons": reasons}, status_code=200 if ok else 503)

    async def _models(self, request: Request) -> Response:
        lines = await self._list(request)
        return Json({"object": "list", "data": [_model_object(line) for line in lines]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for line in await self._list(request):
            if line.name == name:
                return Json(_model_object(line))
        raise NotFound(f"the model {name!r} does not exist, or your key does not allow it")

    async def _list(self, request: Request) -> list[ModelLine]:
        key = read_key(request.headers.get("authorization"))
        handle = await self._keys.handle(key)
        try:
            found = await self._client.call(
                "models.list", None, ModelList, handle=handle, timeout=LIST_SECONDS
            )
        except AccessDenied as error:
            raise await self._keys.denied(key, error) or error from None
        return found.models

    async def _chat(self, request: Request) -> Response:
        key = read_key(request.headers.get("authorization"))
        asked = translate.parse(await read_body(request, self._max_body), ChatRequest)
        shape = Shape(True, asked.model, asked.n or 1, _wants_usage(asked))
        bodies = translate.chats(asked)
        return await self._answer(request, key, shape, "models.chat", bodies, bool(asked.stream))

    async def _complete(self, request: Request) -> Response:
        key = read_key(request.headers.get("authorization"))
        asked = translate.parse(await read_body(request, self._max_body), CompletionRequest)
        shape = Shape(False, asked.model, asked.n or 1, _wants_usage(asked))
        bodies = translate.completions(asked)
        return await self._answer(request, key, shape, "models.complete", bodies, bool(asked.stream))

    async def _embeddings(self, request: Request) -> Response:
        key = read_key(request.headers.get("authorization"))
        asked = translate.decode(await read_body(request, self._max_body), encoders.EmbeddingsRequest)
        made = await self._encode(request, key, "models.embed", encoders.to_embed(asked), Embedded)
        return Json(encoders.embeddings(asked, made))

    async def _rerank(self, request: Request) -> Response:
        key = read_key(request.headers.get("authorization"))
        asked = translate.decode(await read_body(request, self._max_body), encoders.RerankRequest)
        made = await self._encode(request, key, "models.rerank", encoders.to_rerank(asked), Ranked)
        return Json(encoders.ranking(asked, made))

    async def _encode(self, request: Request, key: str, method: str, body: object, type: type[T]) -> T:
        """One call to an encoder, withdrawn when the client leaves."""
        self.progress += 1
        timeout = translate.timeout(request.headers.get("x-request-timeout"))
        handle = await self._keys.handle(key)
        try:
            call = self._client.call(method, body, type, handle=handle, timeout=timeout)
            return await until_gone(request.receive, call)
        except AccessDenied as error:
            raise await self._keys.denied(key, error) or error from None

    async def _answer(
        self,
        request: Request,
        key: str,
        shape: Shape,
        method: str,
        bodies: Sequence[Chat | Complete],
        stream: bool,
    ) -> Response:
        """Run the choices; errors before the first word become the status of the response."""
        self.progress += 1
        timeout = translate.timeout(request.headers.get("x-request-timeout"))
        handle = await self._keys.handle(key)
        batches = choices.run(self._client, method, bodies, handle=handle, timeout=timeout)
        try:
            if stream:
                first = await until_gone(request.receive, anext(batches))
                return EventStream(events(shape, len(bodies), first, batches))
            ends = await until_gone(request.receive, _ends(batches, len(bodies)))
            return Json(shape.whole(ends))
        except AccessDenied as error:
            raise await self._keys.denied(key, error) or error from None


async def _ends(batches: AsyncGenerator[Batch, None], count: int) -> list[Done]:
    ends: dict[int, Done] = {}
    async for batch in batches:
        ends.update({index: item for index, item in batch if isinstance(item, Done)})
    return [ends[index] for index in range(count)]


def _wants_usage(request: ChatRequest | CompletionRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _model_object(line: ModelLine) -> dict[str, Any]:
    return {
        "id": line.name,
        "object": "model",
        "created": line.created,
        "owned_by": "llmos",
        "state": line.state,
        "context_length": line.context,
        "kind": line.kind,
        **({"parent": line.parent} if line.parent else {}),
    }


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return failure(error)


async def _on_system_error(request: Request, error: LLMOSError) -> Response:
    return failure(from_error(error))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}"
    return failure(ApiError(error.status_code, f"{what}: {error.detail.lower()}", code="unknown_url"))


async def _on_gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)

"""Requests of the OpenAI API to messages for models. Pure."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from llmos.services.gateway.encoders import one_or_many
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.schema import UNSUPPORTED, ChatRequest, CompletionRequest, Message, Request
from llmos.services.models.messages import Chat, ChatMessage, Complete, Generation

B = TypeVar("B")
R = TypeVar("R", bound=Request)

MAX_N = 8
MAX_CHOICES = 64
COMPLETION_TOKENS = 16  # what the OpenAI API generates where a completion does not say how much
DEFAULT_TIMEOUT = 600.0
MAX_TIMEOUT = 86_400.0
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def decode(body: bytes, type: type[B]) -> B:
    """A request's body; ApiError 400 says what is wrong with it."""
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error), param=_field(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def parse(body: bytes, type: type[R]) -> R:
    """The body of a request to generate, checked; ApiError 400 says what is wrong with it."""
    request = decode(body, type)
    for name, harmless in UNSUPPORTED.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    if not 1 <= (1 if request.n is None else request.n) <= MAX_N:
        raise ApiError(400, f"n must be 1 to {MAX_N}, not {request.n}", param="n")
    return request


def chats(request: ChatRequest) -> list[Chat]:
    """One message for each of the ``n`` choices."""
    limit = request.max_completion_tokens
    if limit is None:
        limit = request.max_tokens
    messages = [_message(message, at) for at, message in enumerate(request.messages)]
    if not messages:
        raise ApiError(400, "messages must not be empty", param="messages")
    return [
        Chat(model=request.model, messages=messages, generation=_generation(request, limit, choice))
        for choice in range(request.n or 1)
    ]


def completions(request: CompletionRequest) -> list[Complete]:
    """One message for each of the ``n`` choices of each prompt, all choices of the first prompt first."""
    limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    prompts, n = one_or_many(request.prompt, "prompt"), request.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts) * n} choices are over {MAX_CHOICES}", param="prompt")
    return [
        Complete(model=request.model, prompt=prompt, generation=_generation(request, limit, choice))
        for prompt in prompts
        for choice in range(n)
    ]


def timeout(header: str | None) -> float:
    """Seconds until the deadline, from the header X-Request-Timeout."""
    if header is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(header)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= MAX_TIMEOUT:
        raise ApiError(400, f"X-Request-Timeout must be a number of seconds up to {MAX_TIMEOUT:g}")
    return seconds


def _generation(request: Request, limit: int | None, choice: int) -> Generation:
    if limit is not None and limit < 1:
        raise ApiError(400, f"max_tokens must be at least 1, not {limit}", param="max_tokens")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    given = {
        "max_tokens": limit,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": None if request.seed is None else request.seed + choice,
        "logit_bias": request.logit_bias,
        "stop": stop,
        "ignore_eos": request.ignore_eos,
        "band": request.priority,
        "stream": bool(request.stream),
    }
    return Generation(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _message(message: Message, at: int) -> ChatMessage:
    role = ROLES.get(message.role)
    where = f"messages[{at}]"
    if role is None or message.tool_calls:
        raise ApiError(
            400, f"{where}: role {message.role!r} and tool calls are not supported; use {', '.join(ROLES)}",
            param=where,
        )  # fmt: skip
    if message.content is None or isinstance(message.content, str):
        return ChatMessage(role=role, content=message.content or "", name=message.name)
    for part in message.content:
        if part.type != "text":
            raise ApiError(400, f"{where}: parts of type {part.type!r} are not supported", param=where)
    return ChatMessage(role=role, content="".join(part.text for part in message.content), name=message.name)


def _field(message: str) -> str | None:
    """The field that msgspec's message ends with: "... - at `$.name`"."""
    _, marker, path = message.rpartition("at `$.")
    return path.rstrip("`") if marker else None

"""The bodies of requests, as the OpenAI API has them; a field that is not named here is refused."""

from __future__ import annotations

from typing import Any

import msgspec

from llmos.ipc.grant import Band


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class Part(msgspec.Struct):
    """A part of a message; only those of type "text" are supported."""

    type: str
    text: str = ""


class Message(msgspec.Struct):
    """One message of a conversation. What else clients copy from earlier answers is ignored."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. None stands for "not given"."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    # Extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    priority: Band | None = None

    # Accepted, and without effect here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    # Refused, unless the value says "without it".
    logprobs: Any = None


class ChatRequest(Request, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    parallel_tool_calls: Any = None

    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Request, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    # A text, or token ids; or a list of either.
    prompt: str | list[str | int | list[int]]

    echo: Any = None
    suffix: Any = None
    best_of: Any = None


# For each field that is not supported, the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}

"""The messages on the link to models."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from llmos.ipc.grant import Band
from llmos.services.scheduler.messages import Finished


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate; the same for chat and completion. ``max_tokens`` 0: up to the context's end.

    ``temperature`` 0 is greedy. A ``seed`` of None takes a random one. ``stream`` False sends no chunks.
    """

    max_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop: list[str] = []
    ignore_eos: bool = False
    band: Band = "interactive"
    stream: bool = True


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """Answer a conversation. A stream of ``Text``, ended by ``Done``."""

    model: str
    messages: list[ChatMessage]
    tools: list[dict[str, Any]] = []
    generation: Generation = Generation()


class Complete(msgspec.Struct, frozen=True, kw_only=True):
    """Continue a text, or token ids as they are. A stream of ``Text``, ended by ``Done``."""

    model: str
    prompt: str | list[int]
    generation: Generation = Generation()


class Text(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the answer, whole characters only; ``tokens`` counts all produced so far."""

    text: str
    tokens: int


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an answer; ``text`` is the whole of it. ``reason`` "stop" or "length"."""

    text: str
    reason: Literal["stop", "length"]
    usage: Finished


class Resume(msgspec.Struct, frozen=True):
    """Go on with the saved task of this name in the folder of saved tasks. A stream of ``Text``, the first of
    which is what it had said before, ended by ``Done``."""

    name: str


class Load(msgspec.Struct, frozen=True):
    """Load a model of the manifest onto its driver; chunks are the driver's ``LoadProgress``."""

    model: str


class Unload(msgspec.Struct, frozen=True):
    model: str


class ModelLine(msgspec.Struct, frozen=True, kw_only=True):
    """One model; ``state`` "missing" means that its files must be pulled first."""

    name: str
    state: Literal["missing", "unloaded", "loading", "ready", "failed"]
    driver: str
    family: str = ""
    parameters: int = 0
    context: int = 0
    attention: str = ""
    created: int = 0
    progress: float = 0.0
    phase: str = ""
    error: str = ""
    phases: dict[str, float] = {}


class ModelList(msgspec.Struct, frozen=True):
    models: list[ModelLine]


class Tokenize(msgspec.Struct, frozen=True):
    model: str
    text: str


class TokenIds(msgspec.Struct, frozen=True):
    tokens: list[int]


class Detokenize(msgspec.Struct, frozen=True):
    model: str
    tokens: list[int]

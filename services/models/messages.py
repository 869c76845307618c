"""The messages on the link to models."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from llmos.drivers.sdk.messages import Kind
from llmos.ipc.grant import Band
from llmos.services.scheduler.messages import Finished

ModelState = Literal["missing", "unloaded", "loading", "ready", "parked", "waking", "failed"]
ANSWERING = ("ready", "parked", "waking")
"""The states in which a model takes requests."""


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


class Embed(msgspec.Struct, frozen=True, kw_only=True):
    """Make a vector of each text; token ids are taken as they are, with their special tokens.

    A text that is too long is refused, or cut if ``truncate`` is set; so in all that follow.
    """

    model: str
    input: list[str | list[int]]
    truncate: bool = False
    band: Band = "interactive"


class Embedded(msgspec.Struct, frozen=True, kw_only=True):
    """``vectors`` is float32, little-endian, [texts, width]; ``tokens`` counts those of all texts."""

    model: str
    width: int
    vectors: bytes
    tokens: int


class Rerank(msgspec.Struct, frozen=True, kw_only=True):
    """Order documents by how well they answer a query; ``top_n`` 0 returns all."""

    model: str
    query: str
    documents: list[str]
    top_n: int = 0
    truncate: bool = False
    band: Band = "interactive"


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """(index of the document, score), best first. Scores are 0 to 1 of a cross-encoder, which sees query and
    document together; of an embedding model the cosine of their vectors."""

    model: str
    results: list[tuple[int, float]]
    tokens: int


class Classify(msgspec.Struct, frozen=True, kw_only=True):
    """Score each text, or with ``seconds`` each pair, by the model's labels."""

    model: str
    input: list[str]
    seconds: list[str] = []
    truncate: bool = False
    band: Band = "interactive"


class Classified(msgspec.Struct, frozen=True, kw_only=True):
    """For each text a probability for each of ``labels``; they sum to 1 where only one label can be true."""

    model: str
    labels: list[str]
    scores: list[list[float]]
    tokens: int


class Park(msgspec.Struct, frozen=True):
    """Move a model's weights to host memory, once it has no tasks; the next one wakes it."""

    model: str


class Wake(msgspec.Struct, frozen=True):
    """Put a parked model back on its device."""

    model: str


class Load(msgspec.Struct, frozen=True):
    """Load a model of the manifest onto its driver; chunks are the driver's ``LoadProgress``."""

    model: str


class Unload(msgspec.Struct, frozen=True):
    model: str


class LoadAdapter(msgspec.Struct, frozen=True):
    """Load the LoRA adapter in the folder ``source`` (empty: where it was before) beside its model; ``model``
    is MODEL:NAME. Requests can name it so when this is answered by its ``ModelLine``."""

    model: str
    source: str = ""


class UnloadAdapter(msgspec.Struct, frozen=True):
    """Drop the adapter MODEL:NAME, which no task needs."""

    model: str


class ModelLine(msgspec.Struct, frozen=True, kw_only=True):
    """One model; ``state`` "missing" means that its files must be pulled first. An adapter has a line of its
    own, whose ``parent`` is its model. One that is "parked" or "waking" takes requests, which wake it and
    wait; ``woke`` is how many seconds that took the last time."""

    name: str
    state: ModelState
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
    kind: Kind = "decoder"
    mesh: dict[str, int] = {}
    parent: str = ""
    woke: float = 0.0
    sums: str = ""


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

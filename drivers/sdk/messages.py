"""The messages on the link between the scheduler and a driver.

A *sequence* sits in a *slot* of the driver's batch. A *quantum* is a short program for the batch: which
slots to empty, which sequences to start, which pages to append, and for each of its steps which prompt
chunks to prefill; the slots in ``decode`` advance by a token on every step. Tokens never travel to the
driver during decode: the last token, the position and the random counter of a slot live on the device.

An *encoder* has no slots and keeps nothing: it is sent texts, a step's worth at a time, and answers numbers.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

DType = Literal["float32", "bfloat16", "int8", "float8"]
Precision = Literal["same", "int8", "float8"]
DTYPES: tuple[DType, ...] = get_args(DType)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FinishReason = Literal["stop", "length", "error"]
Tier = Literal["device", "host", "disk"]
Kind = Literal["decoder", "encoder"]
Speculation = Literal["off", "auto", "ngram", "draft"]
Arena = Literal["own", "shared"]


class Device(msgspec.Struct, frozen=True):
    """One device that a driver owns; ``memory`` in bytes, 0 where the driver cannot tell."""

    id: int
    kind: Literal["cpu", "gpu", "tpu", "other"]
    name: str
    memory: int = 0


class DriverInfo(msgspec.Struct, frozen=True):
    """What a driver is and what it can do, told before any model is loaded.

    ``dtypes`` are what it can hold: "float32" and "bfloat16" also compute, "int8" and "float8" are for
    weights and KV pages.
    """

    driver: str
    version: str
    devices: list[Device]
    dtypes: list[DType]
    features: list[str] = []


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Load a model's weights and prepare a paged KV cache for it.

    ``source`` is a GGUF file, a folder of safetensors with ``config.json``, or an Orbax checkpoint folder.
    ``cache`` is a folder the driver may keep converted weights and compiled programs in.
    ``dtype`` is what activations are computed in, and what weights are held in if ``weights`` is "same"; with
    "int8" or "float8" the products of the layers hold 8-bit weights with a scale for each output channel.
    ``kv_dtype`` is what pages are held in; 8-bit ones have a scale for each token and head.
    ``pages`` 0 lets the driver take ``memory_fraction`` of what is free on the device after the weights.
    ``mesh`` maps axis names (data, tensor, pipeline, expert, sequence) to sizes; empty means one device.
    ``host_pages`` and ``disk_pages`` are the sizes of the tiers that pages can be moved to; where they are 0,
    ``host_bytes`` and ``disk_bytes`` say it in bytes, and ``host_bytes`` -1 leaves it to the driver.
    ``speculation`` guesses ``speculation_tokens`` tokens (0: as many as the driver likes) and verifies them
    in one step, where that is measured to be faster: "ngram" takes guesses from the sequence's own past,
    "draft" from the smaller model at the source ``draft``, which has the same vocabulary, and "auto" from the
    draft model if there is one. The tokens are those of plain decoding.
    ``arena`` "shared" takes pages from one pool of the device, which all models loaded so with this
    ``kv_dtype`` share. The first of them decides how large it is: ``arena_bytes``, or where these are 0
    ``pages``, or ``memory_fraction`` as above; it is given back when the last is unloaded.
    ``adapters`` LoRA adapters of up to ``adapter_rank`` can be loaded at once; 0 makes no room for any.
    """

    model: str
    source: str
    cache: str = ""
    dtype: DType = "float32"
    weights: Precision = "same"
    kv_dtype: DType = "float32"
    page_tokens: int = 16
    pages: int = 0
    memory_fraction: float = 0.85
    slots: int = 16
    max_context: int = 2048
    chunk_tokens: int = 256
    mesh: dict[str, int] = {}
    host_pages: int = 0
    disk_pages: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    speculation: Speculation = "off"
    speculation_tokens: int = 0
    draft: str = ""
    arena: Arena = "own"
    arena_bytes: int = 0
    adapters: int = 0
    adapter_rank: int = 16


class LoadProgress(msgspec.Struct, frozen=True):
    """How far a load is; ``total`` 0 means unknown."""

    phase: Literal["read", "convert", "restore", "place", "compile", "save"]
    done: int
    total: int


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is ready to execute quanta, or to encode.

    ``pages`` counts the usable pages, numbered 0 to ``pages - 1``; each holds ``page_tokens`` tokens and
    ``page_bytes`` bytes over all layers. ``chunk_tokens`` bounds the prompt tokens of one step; fewer than
    ``least_chunk`` of a prompt take as long as so many. Each of the ``replicas`` has as many slots and pages
    of its own, and executes quanta beside the others. One that is ``parked`` was loaded before, and has to be
    woken first.

    Of an encoder ``pages`` and ``slots`` are 0, ``max_context`` is the longest text, and ``chunk_tokens``
    bounds the texts of one step, each counted as long as the longest. It makes ``width`` numbers of a text:
    a vector, or where it has ``labels`` a score for each, ``exclusive`` if only one of them can be true.
    ``token_types`` is how many types its tokens may be of. Of a decoder ``adapters`` can be loaded at once.

    A model that shares pages names the ``pool`` of each replica's device ("": they are its own). The pool
    has ``slabs`` slabs of ``slab_bytes``, the same for all its models; in slab s this model's pages are
    ``s * slab_pages`` to ``s * slab_pages + slab_pages - 1``, so ``pages`` is all that it could have. Whoever
    hands out pages decides which model has which slab, and the driver is not told. ``sums`` says what adds up
    small arrays over the devices that a model is cut over, and why ("": it is not cut).
    """

    model: str
    family: str
    parameters: int
    weight_bytes: int
    pages: int
    page_tokens: int
    page_bytes: int
    slots: int
    max_context: int
    chunk_tokens: int
    vocab_size: int
    stop_tokens: list[int]
    attention: str
    host_pages: int = 0
    disk_pages: int = 0
    phases: dict[str, float] = {}
    kind: Kind = "decoder"
    width: int = 0
    labels: list[str] = []
    exclusive: bool = True
    token_types: int = 1
    replicas: int = 1
    pool: str = ""
    slabs: int = 0
    slab_pages: int = 0
    slab_bytes: int = 0
    adapters: int = 0
    parked: bool = False
    least_chunk: int = 0
    sums: str = ""


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """Load a LoRA adapter, a folder as PEFT saves it, beside a model; steps go on meanwhile.

    ``adapter`` is what sequences call it by: whoever loads other weights calls them otherwise.
    """

    model: str
    adapter: str
    source: str


class LoadedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that sequences can start with; ``bytes`` that it takes on each replica."""

    adapter: str
    rank: int
    bytes: int


class UnloadAdapter(msgspec.Struct, frozen=True):
    """Forget an adapter that no sequence has."""

    model: str
    adapter: str


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen; the defaults are greedy. ``seed`` is an unsigned 32-bit number.

    Order of operations, as in Hugging Face: logit bias, repetition penalty (prompt and output), presence
    and frequency penalty (output only), temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] = {}


class Start(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sequence enters an empty slot.

    ``tokens`` holds every token known: the prompt, and what was generated before the sequence was last
    displaced; the first ``prompt`` of them are the prompt. ``pages`` is its block table so far. The KV of
    the first ``cached`` tokens is already in those pages (``cached < len(tokens)``). Generation ends with
    "stop" after a token of ``stop`` was produced, or with "length" when the sequence has ``limit`` tokens.
    ``adapter`` is that of a ``LoadAdapter``, empty for the model as it is.
    """

    slot: int
    tokens: list[int]
    prompt: int
    pages: list[int]
    cached: int = 0
    limit: int
    stop: list[int] = []
    sampling: Sampling = Sampling()
    adapter: str = ""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Prefill ``length`` known tokens of a slot from position ``start`` on, in step ``step`` of the quantum.

    The chunk that reaches the last known token also samples the next one in that step.
    """

    step: int
    slot: int
    start: int
    length: int


class Growth(msgspec.Struct, frozen=True, array_like=True):
    """Pages appended to a slot's block table."""

    slot: int
    pages: list[int]


class Quantum(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Work for ``steps`` steps of the batch of one model's replica, applied in the order of the fields.

    A slot in ``decode`` produces one token a step from the step after its last chunk on, until it finishes;
    a slot that has finished, or is not in ``decode``, holds still.
    """

    id: int
    model: str
    steps: int
    release: list[int] = []
    start: list[Start] = []
    grow: list[Growth] = []
    chunks: list[Chunk] = []
    decode: list[int] = []
    replica: int = 0


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced: ``tokens[i]`` belongs to ``slots[i]``; a slot may occur more than once, its
    tokens in order.

    The stop token itself is reported. ``micros`` is the time since the previous step completed, or since
    dispatch where the device was idle.
    """

    quantum: int
    index: int
    slots: list[int]
    tokens: list[int]
    finished: list[tuple[int, FinishReason]]
    micros: int


class QuantumDone(msgspec.Struct, frozen=True, array_like=True):
    """A quantum ended after ``steps`` steps: fewer than asked when it was preempted or nothing was left."""

    quantum: int
    steps: int
    preempted: bool


class EncodeStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of an encoder; ``types`` are the token types of each text, left out where all are 0."""

    model: str
    texts: list[list[int]]
    types: list[list[int]] = []


class EncodedStep(msgspec.Struct, frozen=True):
    """``rows`` is float32, little-endian, [texts, width]. ``micros`` as in ``Step``.

    ``computed`` is for how many tokens, what the driver padded texts and batch with included (0: not said).
    """

    rows: bytes
    width: int
    micros: int
    computed: int = 0


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Copy the KV of pages from one tier to another: (number at the source, number at the target) each.

    On the device the numbers are pages; in the host and disk tiers they are blocks of one page each. Blocks
    on disk are sealed with the key of ``tenant``. A move reads what the quanta sent before it write, and a
    quantum sent after its answer, a ``Moved``, reads what it wrote; steps go on meanwhile, and must not use
    the pages that are written.
    """

    model: str
    source: Tier
    target: Tier
    pages: list[tuple[int, int]]
    tenant: str
    replica: int = 0


class Moved(msgspec.Struct, frozen=True):
    """A move is complete: ``bytes`` copied in ``micros``."""

    bytes: int
    micros: int


class SaveTask(msgspec.Struct, frozen=True, kw_only=True):
    """Write ``state`` and the KV in ``pages`` to the saved task ``name``, sealed with the tenant's key.

    ``digest`` names the tokens whose KV it is. The pages are read like those of a move, and may change hands
    as soon as this was sent. A driver that cannot save pages saves the state alone.
    """

    name: str
    model: str
    tenant: str
    pages: list[int]
    digest: bytes
    state: bytes
    replica: int = 0


class TaskSaved(msgspec.Struct, frozen=True):
    """A saved task is complete: ``pages`` in it, ``bytes`` in all."""

    pages: int
    bytes: int


class OpenTask(msgspec.Struct, frozen=True):
    """Read the state of a saved task of this tenant."""

    name: str
    tenant: str


class TaskOpened(msgspec.Struct, frozen=True):
    """What ``SaveTask`` was given."""

    state: bytes


class RestoreTask(msgspec.Struct, frozen=True, kw_only=True):
    """Fill ``pages`` with those of a saved task from its page ``first`` on; answered by ``Moved``.

    NotSupported where its pages are not of the kind that this driver has for ``model``.
    """

    name: str
    model: str
    tenant: str
    pages: list[int]
    first: int
    digest: bytes
    replica: int = 0


class Preempt(msgspec.Struct, frozen=True):
    """Dispatch no further step of this quantum or of any before it for the same model and replica."""

    quantum: int


class Cut(msgspec.Struct, frozen=True):
    """What a preempt ended: quanta, and how many steps of each were dispatched by then."""

    quanta: list[tuple[int, int]] = []


class Reset(msgspec.Struct, frozen=True):
    """Empty all slots of one replica of a model, of all of them where it is -1: the scheduler that filled
    them is gone."""

    model: str
    replica: int = -1


class Park(msgspec.Struct, frozen=True):
    """Move a model's weights to host memory, and free its device memory; answered by ``Moved``."""

    model: str


class Wake(msgspec.Struct, frozen=True):
    """Put a parked model's weights back on the device; answered by ``Moved``."""

    model: str


class Unload(msgspec.Struct, frozen=True):
    """Forget a model: its weights and its pages."""

    model: str

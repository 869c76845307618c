"""The messages on the link to the scheduler; those to the drivers are in ``llmos.drivers.sdk.messages``."""

from __future__ import annotations

from typing import Literal

import msgspec

from llmos.drivers.sdk.messages import LoadedModel, Sampling
from llmos.ipc.grant import Band

State = Literal["waiting", "running", "stopped"]
Reason = Literal["stop", "length"]


class Resume(msgspec.Struct, frozen=True):
    """Where a task was saved: the file, and how many of its first tokens have their KV there."""

    name: str
    computed: int


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """Run a task: continue ``tokens`` until a token of ``stop``, or ``max_tokens`` new ones.

    The call stays open while the task lives: chunks are ``Tokens`` (or go to this connection's ``attach``
    stream), the end is ``Finished``, cancelling the call kills the task. The header's deadline is the task's.
    Of a task that goes on, the first ``prompt`` tokens are its prompt (0: all of them) and the rest what it
    produced before; the KV of a saved one may be found by ``resume``. ``context`` is the caller's, and kept
    with the task when it is saved. ``adapter`` is one that the model's host has, as it is called there.
    """

    model: str
    tokens: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: list[int] = []
    band: Band = "interactive"
    label: str = ""
    prompt: int = 0
    context: bytes = b""
    resume: Resume | None = None
    adapter: str = ""


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of the task that was submitted with message id ``call``; ``offset`` is the index of the
    first among all it has produced."""

    call: int
    offset: int
    tokens: list[int]


class Emitted(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for all tasks of a connection: the chunks of ``attach``."""

    tokens: list[Tokens]


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended. Times in seconds: waiting for its first quantum, to its first token, in all."""

    task: int
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queued: float
    first_token: float
    total: float


class Encode(msgspec.Struct, frozen=True, kw_only=True):
    """Have an encoder make a row of numbers of each text, its tokens as they are, ``types`` theirs (none: 0).

    Chunks are ``Rows``, in any order, the end is ``Encoded``; cancelling the call ends the job.
    """

    model: str
    texts: list[list[int]]
    types: list[list[int]] = []
    band: Band = "interactive"
    label: str = ""


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """What one step made: ``data`` is float32, little-endian, [indices, width] of these texts."""

    indices: list[int]
    data: bytes


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """All texts are encoded. Times in seconds: waiting for the first step, and in all."""

    task: int
    tokens: int
    queued: float
    total: float


class Host(msgspec.Struct, frozen=True):
    """A driver has loaded a model, and ``adapters`` beside it, and will execute quanta for it, or encode.
    Tasks whose adapter is not among them end."""

    driver: str
    model: LoadedModel
    adapters: list[str] = []


class Adapters(msgspec.Struct, frozen=True):
    """The adapters that a model's host has now, or will have from now on; Busy where a task needs one that is
    not among them."""

    model: str
    adapters: list[str]


class Unhost(msgspec.Struct, frozen=True):
    """A driver no longer serves a model; its tasks go to another host, or wait for one."""

    driver: str
    model: str


class Park(msgspec.Struct, frozen=True, kw_only=True):
    """A driver has a model parked, or is about to: no more is run there, and tasks for it wait.

    The chunk, which is nil, says that the driver may be told; the call ends when a task comes. Refused while
    there are tasks, or if there was one within ``idle`` seconds: ``refuse`` ends those that are waiting by
    ENOMEM, with this text, since the model cannot be woken.
    """

    driver: str
    model: LoadedModel
    adapters: list[str] = []
    idle: float = 0.0
    refuse: str = ""


class TaskLine(msgspec.Struct, frozen=True, kw_only=True):
    """One task as ``ps`` shows it; ``age`` in seconds."""

    task: int
    tenant: str
    principal: str
    model: str
    driver: str
    band: Band
    state: State
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    pages: int
    age: float
    label: str


class Tasks(msgspec.Struct, frozen=True):
    tasks: list[TaskLine]


class Kill(msgspec.Struct, frozen=True):
    """End a task; its caller gets ECANCELED."""

    task: int


class Nice(msgspec.Struct, frozen=True):
    """Move a task to another band, up to the ceiling of the caller's grant."""

    task: int
    band: Band


class Pause(msgspec.Struct, frozen=True):
    """Take a task off the device until ``cont``; it keeps its pages while nobody needs them."""

    task: int


class Cont(msgspec.Struct, frozen=True):
    """Let a stopped task go on."""

    task: int


class Save(msgspec.Struct, frozen=True):
    """Stop a task, write it to a file, and end it; its caller gets ECANCELED. It only stops if that fails."""

    task: int


class Saved(msgspec.Struct, frozen=True):
    """The name of the file in the folder of saved tasks; how many KV pages it has, its size in bytes."""

    name: str
    pages: int
    bytes: int


class TaskState(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved task consists of besides its KV; ``computed`` tokens of it have some."""

    model: str
    tenant: str
    tokens: list[int]
    prompt: int
    limit: int
    stop: list[int]
    sampling: Sampling
    band: Band
    label: str
    context: bytes
    computed: int
    adapter: str = ""


class HostLine(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a model on one driver; ``idle`` seconds since the model had a task, 0.0 while it has."""

    driver: str
    model: str
    running: int
    slots: int
    steps: int
    tokens: int
    step_micros: float
    replica: int = 0
    idle: float = 0.0


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the start; ``served`` maps tenants to their virtual token counters."""

    waiting: int
    running: int
    finished: int
    displaced: int
    tokens: int
    served: dict[str, float]
    hosts: list[HostLine]

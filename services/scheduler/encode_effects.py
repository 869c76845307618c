"""Encoding's effects as messages, and what makes a request for an encoder admissible."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llmos.drivers.sdk.checks import TEXT_LIMIT, TEXT_TOKENS
from llmos.drivers.sdk.messages import EncodedStep, LoadedModel
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Busy, Canceled, HostDown, InvalidArgument, LLMOSError
from llmos.ipc.server import Incoming
from llmos.services.scheduler.compose import STEP_BUDGET
from llmos.services.scheduler.encoding import STEP_SECONDS, Batch, EncoderHost, Job
from llmos.services.scheduler.limits import RateLimits
from llmos.services.scheduler.messages import Encode, Encoded, HostLine, Rows, TaskLine

if TYPE_CHECKING:
    from llmos.services.scheduler.server import Scheduler

RETRY_SECONDS = 0.05
now = time.monotonic


class EncodeEffects:
    """Implements ``encoding.Effects``; the answers of the drivers go back as events."""

    def __init__(self, server: Scheduler, rates: RateLimits) -> None:
        self._server = server
        self._rates = rates
        self._asked: set[str] = set()

    def seconds(self, driver: str) -> float:
        """As long as prefill may take beside realtime tasks; not at all while they might miss a deadline."""
        hosts = [host for host in self._server.core.hosts.values() if host.driver == driver]
        if any(host.crunch for host in hosts):
            return 0.0
        beside = any(task.rank == 0 for host in hosts for task in host.running)
        return STEP_BUDGET[0] if beside else STEP_SECONDS

    def later(self, model: str) -> None:
        if model in self._asked:
            return

        def again() -> None:
            self._asked.discard(model)
            self._server.encoding.pump(model, now())

        self._asked.add(model)
        self._server.after(RETRY_SECONDS, again)

    def encode(self, host: EncoderHost, batch: Batch) -> None:
        def answered(answer: Answer) -> None:
            encoding = self._server.encoding
            if answer.error is None:
                encoding.done(host, batch, codec.decode(answer.body, EncodedStep), now())
            elif isinstance(answer.error, HostDown):
                if encoding.hosts.get(host.name) is host:
                    encoding.lose_host(host.name, now())
            elif isinstance(answer.error, Canceled | Busy):
                self._server.after(RETRY_SECONDS, lambda: encoding.repeat(host, batch, now()))
            else:
                encoding.failed(host, batch, answer.error, now())

        self._server.call(f"driver.{host.driver}.encode", batch.message(host.model.model), answered)

    def rows(self, job: Job, indices: list[int], rows: bytes) -> None:
        job.call.chunk(Rows(indices, rows))

    def finish(self, job: Job, error: LLMOSError | None, now: float) -> None:
        call: Incoming = job.call
        self._server.parking.used(job.model, now)
        if error is not None:
            self._rates.give_back(job.tenant, sum(map(len, job.texts)) * job.left // len(job.texts))
            call.fail(error)
            return
        call.end(
            Encoded(
                task=job.id,
                tokens=job.tokens,
                queued=job.started_at - job.arrived,
                total=now - job.arrived,
            )
        )


def check_texts(model: LoadedModel, request: Encode) -> None:
    """Refuse what this encoder could never do: others share its steps."""
    if model.kind != "encoder":
        raise InvalidArgument(f"{request.model} generates text: it has no encoder's vectors or scores")
    if not 0 < len(request.texts) <= TEXT_LIMIT:
        raise InvalidArgument(f"a request has 1 to {TEXT_LIMIT} texts, not {len(request.texts)}")
    if (total := sum(map(len, request.texts))) > TEXT_TOKENS:
        raise InvalidArgument(f"{total} tokens in one request exceed {TEXT_TOKENS}: send fewer texts at once")
    if request.types and [*map(len, request.types)] != [*map(len, request.texts)]:
        raise InvalidArgument("types must be as many as the tokens of each text, or left out")
    for number, text in enumerate(request.texts):
        if not 0 < len(text) <= model.max_context:
            raise InvalidArgument(
                f"text {number} has {len(text)} tokens, not 1 to {model.max_context}: shorten or truncate it",
                limit=model.max_context,
                tokens=len(text),
            )
        if not 0 <= min(text) <= max(text) < model.vocab_size:
            raise InvalidArgument(f"text {number}: a token id is outside 0 to {model.vocab_size - 1}")
    for number, types in enumerate(request.types):
        if not 0 <= min(types) <= max(types) < model.token_types:
            raise InvalidArgument(f"text {number}: a token type is outside 0 to {model.token_types - 1}")


def job_line(job: Job, driver: str) -> TaskLine:
    """A job among the tasks; ``completion_tokens`` is 0, for it produces none."""
    return TaskLine(
        task=job.id,
        tenant=job.tenant,
        principal=job.principal,
        model=job.model,
        driver=driver if job.flying else "",
        band=job.band,
        state="running" if job.flying else "waiting",
        prompt_tokens=job.tokens,
        completion_tokens=0,
        max_tokens=0,
        pages=0,
        age=now() - job.arrived,
        label=job.label,
    )


def encoder_line(host: EncoderHost, idle: float) -> HostLine:
    """An encoder among the hosts; its "slots" are the texts at the driver."""
    texts = sum(len(indices) for batch in host.flight for _, indices in batch.parts)
    return HostLine(
        driver=host.driver,
        model=host.model.model,
        running=texts,
        slots=0,
        steps=host.steps,
        tokens=host.tokens,
        step_micros=host.step_micros,
        idle=idle,
    )

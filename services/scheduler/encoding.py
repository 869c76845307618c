"""Work for encoders: whose texts are next, and which of them go into one step. Pure; no I/O, no clock.

A request is a ``Job`` of many texts. It is cut into steps that stay within a budget of time, so that a large
one holds the device no longer than a small one; texts of one length class share a step, whoever sent them.
Bands are strict, realtime goes by deadline, and tenants take turns by the same virtual token counters as
for generation (``queue``). What was at a driver that died is sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from llmos.drivers.sdk.messages import EncodedStep, EncodeStep, LoadedModel
from llmos.ipc.errors import IOFailure, LLMOSError
from llmos.ipc.grant import BANDS, Band
from llmos.services.scheduler.queue import AGED_EVERY, AGING_SECONDS, Counters

STEPS_IN_FLIGHT = 2
STEP_SECONDS = 0.05
SMOOTHING = 0.25
SHORTEST = 16  # texts are counted as so long at least, and in powers of two
LOOK = 256  # jobs of a tenant that are looked through for texts that share a step


def length_class(tokens: int) -> int:
    """The length that a text is counted as: drivers pad alike."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


@dataclass(eq=False, slots=True)
class Job:
    """One request; ``waiting`` holds the numbers of the texts that are at no driver, by length class."""

    id: int
    tenant: str
    principal: str
    model: str
    band: Band
    texts: list[list[int]]
    arrived: float
    types: list[list[int]] = field(default_factory=list)
    deadline: float = 0.0
    weight: float = 1.0
    max_running: int = 0
    label: str = ""
    call: Any = None

    waiting: dict[int, deque[int]] = field(init=False)
    left: int = field(init=False)
    flying: int = 0
    started_at: float = 0.0
    ended: bool = False

    def __post_init__(self) -> None:
        self.left, self.waiting = len(self.texts), {}
        for index, text in enumerate(self.texts):
            self.waiting.setdefault(length_class(len(text)), deque()).append(index)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def rank(self) -> int:
        return BANDS.index(self.band)

    def take(self, size: int, count: int) -> list[int]:
        """Up to ``count`` of the texts of a length class."""
        line = self.waiting.get(size, deque())
        taken = [line.popleft() for _ in range(min(count, len(line)))]
        if not line:
            self.waiting.pop(size, None)
        self.flying += len(taken)
        return taken

    def put_back(self, indices: list[int]) -> None:
        """These were not computed after all."""
        self.flying -= len(indices)
        for index in reversed(indices):
            self.waiting.setdefault(length_class(len(self.texts[index])), deque()).appendleft(index)


@dataclass(eq=False)
class Batch:
    """One step: which texts of which jobs, in order, each counted as ``size`` tokens."""

    size: int
    parts: list[tuple[Job, list[int]]]

    @property
    def padded(self) -> int:
        return self.size * sum(len(indices) for _, indices in self.parts)

    def message(self, model: str) -> EncodeStep:
        texts = [job.texts[index] for job, indices in self.parts for index in indices]
        if not any(job.types for job, _ in self.parts):
            return EncodeStep(model=model, texts=texts)
        types = [
            job.types[index] if job.types else [0] * len(job.texts[index])
            for job, indices in self.parts
            for index in indices
        ]
        return EncodeStep(model=model, texts=texts, types=types)


@dataclass(eq=False)
class EncoderHost:
    """One encoder on one driver; counters as of a decoder's host.

    ``budget`` is how many tokens a step takes in ``STEP_SECONDS``, as the steps so far tell.
    """

    driver: str
    model: LoadedModel
    flight: list[Batch] = field(default_factory=list)
    budget: float = field(init=False)
    steps: int = 0
    tokens: int = 0
    step_micros: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.model.chunk_tokens

    @property
    def name(self) -> str:
        return f"{self.driver}/{self.model.model}"

    def room(self, size: int, seconds: float) -> int:
        """How many texts of a length class fit in a step of so many seconds; at least one."""
        return max(1, int(self.budget * min(1.0, seconds / STEP_SECONDS)) // size)

    def note(self, batch: Batch, step: EncodedStep) -> None:
        self.steps += 1
        self.tokens += sum(len(job.texts[index]) for job, indices in batch.parts for index in indices)
        self.step_micros += 0.1 * (step.micros - self.step_micros) if self.step_micros else step.micros
        seconds, computed = step.micros / 1e6, max(step.computed, batch.padded)
        # A step that was neither full nor long says little: most of it is not for its tokens.
        if 2 * computed >= self.budget or seconds > STEP_SECONDS:
            fits = min(self.model.chunk_tokens, computed * STEP_SECONDS / max(seconds, 1e-6))
            self.budget += SMOOTHING * (fits - self.budget)


class Effects(Protocol):
    """What ``Encoding`` asks for; answers come back as events.

    ``seconds`` is how long a step of a lower band may hold a driver now, for the sake of the realtime tasks
    that generate there; where it is 0.0, ``later`` asks for a ``pump`` when that may have changed.
    """

    def encode(self, host: EncoderHost, batch: Batch) -> None: ...
    def seconds(self, driver: str) -> float: ...
    def later(self, model: str) -> None: ...
    def rows(self, job: Job, indices: list[int], rows: bytes) -> None: ...
    def finish(self, job: Job, error: LLMOSError | None, now: float) -> None: ...


class Encoding:
    """All jobs and the hosts that do them; ``others`` says how many tasks of a tenant run elsewhere."""

    def __init__(
        self, effects: Effects, counters: Counters, others: Callable[[str], int] = lambda _: 0
    ) -> None:
        self._effects = effects
        self._counters = counters
        self._others = others
        self._lines: dict[tuple[str, int], dict[str, deque[Job]]] = {}
        self._since_aged = 0
        self.models: dict[str, LoadedModel] = {}
        self.hosts: dict[str, EncoderHost] = {}
        self.jobs: dict[int, Job] = {}
        self.finished = 0

    # --- events ---

    def submit(self, job: Job, now: float) -> None:
        """A job arrived, and was found admissible."""
        self.jobs[job.id] = job
        self._counters.enter(job.tenant)
        self._line(job).append(job)
        self.pump(job.model, now)

    def kill(self, job: Job, error: LLMOSError, now: float) -> None:
        """End a job; what a driver still makes of it is dropped."""
        if not job.ended:
            self._finish(job, error, now)
            self.pump(job.model, now)

    def nice(self, job: Job, band: Band, now: float) -> None:
        """Move a job to another band."""
        self._leave_line(job)
        job.band = band
        self._line(job).append(job)
        self.pump(job.model, now)

    def add_host(self, host: EncoderHost, now: float) -> None:
        """A driver is ready to encode; one of that name that was there before is not any more."""
        self.lose_host(host.name, now)
        self.models[host.model.model] = host.model
        self.hosts[host.name] = host
        self.pump(host.model.model, now)

    def lose_host(self, name: str, now: float) -> None:
        """A driver is gone: what it was computing goes back to the front."""
        host = self.hosts.pop(name, None)
        if host is None:
            return
        for batch in reversed(host.flight):
            self._put_back(batch)
        host.flight.clear()
        self.pump(host.model.model, now)

    def done(self, host: EncoderHost, batch: Batch, step: EncodedStep, now: float) -> None:
        """A step's numbers arrived."""
        if not self._landed(host, batch):
            return
        host.note(batch, step)
        at, row = 0, 4 * host.model.width
        for job, indices in batch.parts:
            data = step.rows[at : at + row * len(indices)]
            at += row * len(indices)
            if job.ended:
                continue
            job.flying -= len(indices)
            job.left -= len(indices)
            self._effects.rows(job, indices, data)
            if not job.left:
                self._finish(job, None, now)
        self.pump(host.model.model, now)

    def failed(self, host: EncoderHost, batch: Batch, error: LLMOSError, now: float) -> None:
        """A driver could not compute a step: the jobs that took part end."""
        if self._landed(host, batch):
            for job, _ in batch.parts:
                if not job.ended:
                    self._finish(job, IOFailure(f"the driver failed: {error}"), now)
            self.pump(host.model.model, now)

    def repeat(self, host: EncoderHost, batch: Batch, now: float) -> None:
        """A driver did not begin a step: it is sent again."""
        if self._landed(host, batch):
            self._put_back(batch)
            self.pump(host.model.model, now)

    def pump(self, model: str, now: float) -> None:
        """Keep a step queued behind the running one, on every host of a model."""
        hosts = [host for host in self.hosts.values() if host.model.model == model]
        while hosts:
            host = min(hosts, key=lambda host: len(host.flight))
            batch = self._compose(host, now) if len(host.flight) < STEPS_IN_FLIGHT else None
            if batch is None:
                return
            host.flight.append(batch)
            self._effects.encode(host, batch)

    # --- what follows from them ---

    def _line(self, job: Job) -> deque[Job]:
        return self._lines.setdefault((job.model, job.rank), {}).setdefault(job.tenant, deque())

    def _leave_line(self, job: Job) -> None:
        line = self._line(job)
        line.remove(job)
        if not line:
            del self._lines[job.model, job.rank][job.tenant]

    def _compose(self, host: EncoderHost, now: float) -> Batch | None:
        """The next step: a text of the job that is first, and what shares its band and length class."""
        first = self._first(host.model.model, now)
        if first is None:
            return None
        seconds = self._effects.seconds(host.driver) if first.rank else STEP_SECONDS
        if not seconds:
            self._effects.later(host.model.model)
            return None
        size = min(first.waiting, key=lambda size: first.waiting[size][0])
        batch, room = Batch(size, []), host.room(size, seconds)
        for job in self._together(first):
            if not room:
                break
            if indices := job.take(size, room):
                room -= len(indices)
                batch.parts.append((job, indices))
                job.started_at = job.started_at or now
                self._counters.charge(job, sum(len(job.texts[index]) for index in indices), 0)
        return batch

    def _first(self, model: str, now: float) -> Job | None:
        heads = [list(self._heads(model, rank)) for rank in range(len(BANDS))]
        if heads[0]:
            return min(heads[0], key=lambda job: (job.deadline or float("inf"), job.arrived, job.id))
        aged = [job for job in heads[2] if now - job.arrived > AGING_SECONDS]
        if heads[1] and not (aged and self._since_aged >= AGED_EVERY - 1):
            self._since_aged += 1
            return min(heads[1], key=self._turn)
        self._since_aged = 0
        return min(aged or heads[2], key=self._turn, default=None)

    def _heads(self, model: str, rank: int) -> Iterator[Job]:
        """Of each tenant the first job with a text that waits; in realtime all of them."""
        for line in self._lines.get((model, rank), {}).values():
            for job in line:
                if job.waiting and self._may_run(job):
                    yield job
                    if rank:
                        break

    def _together(self, first: Job) -> Iterator[Job]:
        """The first, then the jobs of its band, tenant by tenant in the order of their turns."""
        yield first
        lines = self._lines[first.model, first.rank]
        for tenant in sorted(lines, key=lambda tenant: self._counters.served.get(tenant, 0.0)):
            for job in islice(lines[tenant], LOOK):
                if job is not first and self._may_run(job):
                    yield job

    def _may_run(self, job: Job) -> bool:
        if not job.max_running or job.flying:
            return True
        mine = sum(other.flying > 0 for other in self.jobs.values() if other.tenant == job.tenant)
        return mine + self._others(job.tenant) < job.max_running

    def _turn(self, job: Job) -> tuple[float, float, int]:
        return self._counters.served.get(job.tenant, 0.0), job.arrived, job.id

    def _landed(self, host: EncoderHost, batch: Batch) -> bool:
        """Whether a step was still expected of this host."""
        if self.hosts.get(host.name) is not host or batch not in host.flight:
            return False
        host.flight.remove(batch)
        return True

    def _put_back(self, batch: Batch) -> None:
        for job, indices in batch.parts:
            if not job.ended:
                job.put_back(indices)
                self._counters.refund(job, sum(len(job.texts[index]) for index in indices))

    def _finish(self, job: Job, error: LLMOSError | None, now: float) -> None:
        job.ended = True
        self._leave_line(job)
        self._counters.leave(job.tenant)
        del self.jobs[job.id]
        self.finished += 1
        self._effects.finish(job, error, now)

"""The scheduler's messages, and its calls to memory and the drivers. What to do is decided in ``core``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from llmos.drivers.sdk.checks import STOP_LIMIT, check_sampling
from llmos.drivers.sdk.messages import LoadedModel, Reset
from llmos.ipc import paths
from llmos.ipc.calls import Answer
from llmos.ipc.errors import (
    AccessDenied,
    Busy,
    Canceled,
    HostDown,
    InvalidArgument,
    LLMOSError,
    NotFound,
    NotSupported,
)
from llmos.ipc.grant import Band, Grant
from llmos.ipc.link import now as wall_now
from llmos.ipc.server import Incoming, Later, Server, log, method
from llmos.services import adapters, manifest
from llmos.services.memory.messages import DropArena
from llmos.services.scheduler import quotas, saving
from llmos.services.scheduler.charges import Charges
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.effects import MessageEffects, arena_of, holdings
from llmos.services.scheduler.encode_effects import EncodeEffects, check_texts, encoder_line, job_line
from llmos.services.scheduler.encoding import EncoderHost, Encoding, Job
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.limits import RateLimits
from llmos.services.scheduler.messages import (
    Adapters,
    Cont,
    Encode,
    HostLine,
    Kill,
    Nice,
    Park,
    Pause,
    Save,
    SchedulerStats,
    State,
    Submit,
    TaskLine,
    Tasks,
    Unhost,
)
from llmos.services.scheduler.messages import Host as HostRequest
from llmos.services.scheduler.parking import Parking
from llmos.services.scheduler.task import Place, Task

RETRY_SECONDS = 0.05
CONTEXT_BYTES = 64 << 10
now = time.monotonic


class Scheduler(Server):
    """Thin handlers; every effect of the core is one message."""

    name = "scheduler"
    watch = True

    def start(self) -> None:
        spec = manifest.read_running().scheduler
        self._queue_limit = spec.queue
        self._attached: dict[int, Incoming] = {}
        self._charges = Charges(paths.run_dir())
        self._rates = RateLimits(self._charges.read(now()), self._charges.note)
        self.core = Core(MessageEffects(self, self._attached, self._rates), spec.steps, spec.share)
        self.encoding = Encoding(EncodeEffects(self, self._rates), self.core.counters, self.core.running_of)
        self.parking = Parking(self.core, self.encoding)
        self._ids = itertools.count(1)
        self._memory = 0
        self._adapters: dict[str, list[str]] = {}

    # --- calls served ---

    @method
    def submit(self, request: Submit, call: Incoming) -> Later:
        """Chunks are ``Tokens`` unless the connection has an ``attach`` stream; the end is ``Finished``."""
        task = self._admissible(request, call)
        call.on_cancel = lambda: self.core.kill(task, Canceled("the caller withdrew the task"), now())
        self.core.submit(task, now())
        self.parking.used(task.model, now())
        grant = call.origin.grant
        self._rates.take(grant.tenant, grant.tokens_per_minute, task.limit, now())
        return Later()

    @method
    def encode(self, request: Encode, call: Incoming) -> Later:
        """Chunks are ``Rows``; the end is ``Encoded``."""
        job = self._admissible_job(request, call)
        call.on_cancel = lambda: self.encoding.kill(job, Canceled("the caller withdrew the job"), now())
        grant = call.origin.grant
        self._rates.take(grant.tenant, grant.tokens_per_minute, job.tokens, now())
        self.encoding.submit(job, now())
        self.parking.used(job.model, now())
        return Later()

    @method
    def attach(self, request: None, call: Incoming) -> Later:
        """One stream of ``Emitted`` for all tasks that this connection submits."""
        connection = call.origin.connection
        self._attached[connection] = call
        call.on_cancel = lambda: self._attached.pop(connection, None)
        return Later()

    @method
    def tasks(self, request: None, call: Incoming) -> Tasks:
        """The caller's tenant's tasks, or everyone's with the right ``scheduler.any_tenant``."""
        mine = [task for task in self.core.tasks.values() if _may_touch(call, task)]
        jobs = [job for job in self.encoding.jobs.values() if _may_touch(call, job)]
        drivers = {host.model.model: host.driver for host in self.encoding.hosts.values()}
        return Tasks(
            [_line(task, self.core.hosts.get(task.arena)) for task in mine]
            + [job_line(job, drivers.get(job.model, "")) for job in jobs]
        )

    @method
    def kill(self, request: Kill, call: Incoming) -> None:
        if (job := self._job(request.task, call)) is not None:
            self.encoding.kill(job, Canceled("the task was killed"), now())
        else:
            self.core.kill(self._task(request.task, call), Canceled("the task was killed"), now())

    @method
    def nice(self, request: Nice, call: Incoming) -> None:
        """Up to the caller's own ceiling; into realtime only if the task's deadline can be kept."""
        _check_band(call, request.band)
        if (job := self._job(request.task, call)) is not None:
            self.encoding.nice(job, request.band, now())
        else:
            self.core.nice(self._task(request.task, call), request.band, now())

    @method
    def pause(self, request: Pause, call: Incoming) -> None:
        """Succeeds as well where the task is stopped already."""
        self.core.stop(self._task(request.task, call), now())

    @method
    def cont(self, request: Cont, call: Incoming) -> None:
        """Succeeds as well where the task is not stopped."""
        task = self._task(request.task, call)
        self.core.cont(task, now())
        self.parking.used(task.model, now())

    @method
    def save(self, request: Save, call: Incoming) -> Later:
        """The reply is ``Saved``."""
        saving.save(self, self._task(request.task, call), call, now)
        return Later()

    @method
    def stats(self, request: None, call: Incoming) -> SchedulerStats:
        core, encoding, busy = self.core, self.encoding, self.parking.busy()

        def idle(model: str) -> float:
            return self.parking.idle(model, busy, now())

        lines = [_host_line(host, idle(host.model.model)) for host in core.hosts.values()]
        lines += [encoder_line(host, idle(host.model.model)) for host in encoding.hosts.values()]
        running = sum(len(host.running) for host in core.hosts.values())
        running += sum(job.flying > 0 for job in encoding.jobs.values())
        return SchedulerStats(
            waiting=len(core.tasks) + len(encoding.jobs) - running,
            running=running,
            finished=core.finished + encoding.finished,
            displaced=core.seating.displaced,
            tokens=sum(line.tokens for line in lines),
            served=dict(core.counters.served),
            hosts=lines,
        )

    @method
    def host(self, request: HostRequest, call: Incoming) -> Later:
        """Answered once the driver's slots are empty and memory knows the arenas: each replica is a host.
        For an encoder at once."""
        if request.model.kind == "encoder":
            self.encoding.add_host(EncoderHost(request.driver, request.model), now())
            self.parking.awake(request.model.model, now())
            call.reply()
            return Later()
        self._adapters[request.model.model] = request.adapters
        for task in self._tasks_without_adapter(request.model.model, request.adapters):
            self.core.kill(task, NotFound(f"adapter {task.adapter} could not be loaded again"), now())
        for previous in self._replicas(request.driver, request.model.model):
            self.core.lose_host(previous, now())
        hosts = [Host(request.driver, request.model, i) for i in range(max(1, request.model.replicas))]
        left, failed = len(hosts), False

        def opened(error: LLMOSError | None) -> None:
            nonlocal left, failed
            left -= 1
            if error is not None and not failed:
                failed = True
                call.fail(error)
            elif not left and not failed:
                self.parking.awake(request.model.model, now())
                call.reply()

        for host in hosts:
            self._open(host, opened)
        return Later()

    @method
    def adapters(self, request: Adapters, call: Incoming) -> None:
        if request.model not in self._adapters:
            raise NotFound(f"no driver serves the model {request.model!r} yet")
        if left := self._tasks_without_adapter(request.model, request.adapters):
            raise Busy(f"{len(left)} tasks need adapter {left[0].adapter}: wait until they end, or kill them")
        self._adapters[request.model] = request.adapters

    @method
    def unhost(self, request: Unhost, call: Incoming) -> None:
        parked = self.parking.waiting.pop(request.model, None)
        if parked is not None:
            parked.end()
        elif not self._unhost(request.driver, request.model):
            raise NotFound(f"{request.driver} does not host {request.model!r}")

    @method
    def park(self, request: Park, call: Incoming) -> Later:
        """The chunk, which is nil, says that no task uses the model any more; the end, that one waits."""
        unhost = lambda: self._unhost(request.driver, request.model.model)  # noqa: E731
        self.parking.park(request, call, unhost, now())
        self._adapters[request.model.model] = request.adapters
        return Later()

    # --- what watching brings ---

    def on_down(self, name: str, connection: int) -> None:
        for host in list(self.core.hosts.values()):
            if name == f"driver.{host.driver}":
                log.warning("%s went down; its %d tasks wait for it", name, len(host.running))
                self._forget(host)
        for encoder in list(self.encoding.hosts.values()):
            if name == f"driver.{encoder.driver}":
                self.encoding.lose_host(encoder.name, now())

    def on_up(self, name: str, connection: int) -> None:
        if name != "memory":
            return
        if self._memory:
            log.warning("memory was started anew; telling it what is held")
            seated = [(h, t) for h in self.core.hosts.values() for t in self.core.swapping.memory_lost(h)]
            for host in self.core.hosts.values():
                self.cast("memory.restore", holdings(self.core, host))
            # Not before memory knows which slabs of a pool are whose.
            for host, task in seated:
                self.core.paging.reserve(host, task)
        self._memory = connection

    def on_kernel_restart(self) -> None:
        # Every caller's connection is gone, so nobody is left to read the answers.
        self._attached.clear()
        self.parking.waiting.clear()
        for task in list(self.core.tasks.values()):
            self.core.kill(task, HostDown("the kernel went down"), now())
        for job in list(self.encoding.jobs.values()):
            self.encoding.kill(job, HostDown("the kernel went down"), now())
        for encoder in list(self.encoding.hosts.values()):
            self.encoding.lose_host(encoder.name, now())
        for host in list(self.core.hosts.values()):
            self.core.lose_host(host, now())

    # --- helpers ---

    def _tasks_without_adapter(self, model: str, adapters: list[str]) -> list[Task]:
        tasks = [task for task in self.core.tasks.values() if task.model == model]
        return [task for task in tasks if task.adapter and task.adapter not in adapters]

    def _unhost(self, driver: str, model: str) -> bool:
        """Take a model from a driver, and its pages from memory; whether it was there."""
        if (name := f"{driver}/{model}") in self.encoding.hosts:
            self.encoding.lose_host(name, now())
            return True
        hosts = self._replicas(driver, model)
        for host in hosts:
            self._forget(host)
        return bool(hosts)

    def _replicas(self, driver: str, model: str) -> list[Host]:
        return [h for h in self.core.hosts.values() if (h.driver, h.model.model) == (driver, model)]

    def _forget(self, host: Host) -> None:
        """A host is gone, and so is what memory knows of it."""
        self.core.lose_host(host, now())
        self.cast("memory.drop_arena", DropArena(host.arena))
        self.core.forget_host(host, now())

    def _open(self, host: Host, then: Callable[[LLMOSError | None], None]) -> None:
        """Empty the driver's slots, declare the arena, and let the host take work."""

        def declared(answer: Answer) -> None:
            if answer.error is None:
                self.core.add_host(host, now())
            then(answer.error)

        def emptied(answer: Answer) -> None:
            if answer.error is None:
                self.call("memory.arena", arena_of(host), declared, timeout=10)
            else:
                then(answer.error)

        self.call(f"driver.{host.driver}.reset", Reset(host.model.model, host.replica), emptied, timeout=60)

    def complain(self, message: str) -> None:
        """Say in the log that something failed that nobody waits for."""
        log.warning("%s", message)

    def quantum_failed(self, host: Host, error: LLMOSError) -> None:
        """A driver died, or refused a quantum: then its slots and ours may differ, and both start empty."""
        if isinstance(error, HostDown):
            self.core.lose_host(host, now())
            return
        log.error("%s refused a quantum: %s", host.driver, error)
        self.core.fail_host(host, error, now())

        def opened(error: LLMOSError | None) -> None:
            if error is not None:
                log.error("%s stays without work: %s", host.driver, error)

        self._open(Host(host.driver, host.model, host.replica), opened)

    def _admissible(self, request: Submit, call: Incoming) -> Task:
        """A task for a request that can be served, now or later; every check comes before any effect."""
        grant = call.origin.grant
        call.origin.check_model(adapters.served(request.model, request.adapter))
        _check_band(call, request.band)
        if request.model in self.encoding.models:
            raise InvalidArgument(f"{request.model} is an encoder: it generates no text")
        if request.model not in self.core.queues:
            raise NotFound(f"no driver serves the model {request.model!r} yet")
        if request.adapter and request.adapter not in self._adapters.get(request.model, ()):
            raise NotFound(f"{request.model!r} has no adapter {request.adapter!r}")
        limit = len(request.tokens) + request.max_tokens
        _check_fit(self.core.models[request.model], request, limit)
        quotas.check_tokens(grant, request.max_tokens)
        quotas.check_pages(grant, limit, self.core.models[request.model].page_tokens)
        self._check_room(grant)
        quotas.check_rate(grant, self._rates, limit, now())
        return Task(
            id=next(self._ids),
            tenant=grant.tenant,
            principal=grant.principal,
            model=request.model,
            band=request.band,
            tokens=list(request.tokens),
            prompt=request.prompt or len(request.tokens),
            limit=limit,
            arrived=now(),
            sampling=request.sampling,
            stop=request.stop,
            deadline=now() + (call.deadline - wall_now()) / 1e6 if call.deadline else 0.0,
            weight=grant.weight,
            max_running=grant.max_running,
            max_pages=grant.max_pages,
            label=request.label[:80],
            call=call,
            context=request.context,
            resume=request.resume,
            adapter=request.adapter,
        )

    def _admissible_job(self, request: Encode, call: Incoming) -> Job:
        """As ``_admissible``, for an encoder."""
        grant = call.origin.grant
        call.origin.check_model(request.model)
        _check_band(call, request.band)
        model = self.encoding.models.get(request.model) or self.core.models.get(request.model)
        if model is None:
            raise NotFound(f"no driver serves the model {request.model!r} yet")
        check_texts(model, request)
        self._check_room(grant)
        quotas.check_rate(grant, self._rates, sum(map(len, request.texts)), now())
        return Job(
            id=next(self._ids),
            tenant=grant.tenant,
            principal=grant.principal,
            model=request.model,
            band=request.band,
            texts=request.texts,
            types=request.types,
            arrived=now(),
            deadline=now() + (call.deadline - wall_now()) / 1e6 if call.deadline else 0.0,
            weight=grant.weight,
            max_running=grant.max_running,
            label=request.label[:80],
            call=call,
        )

    def _check_room(self, grant: Grant) -> None:
        """Whatever has no slot is waiting: also who is held for a prefix, or stopped."""
        core, tenant = self.core, grant.tenant
        waiting = len(core.tasks) + len(self.encoding.jobs) - sum(host.seated for host in core.hosts.values())
        mine = core.counters.active(tenant) - core.running_of(tenant)
        quotas.check_room(grant, waiting, self._queue_limit, mine)

    def _job(self, id: int, call: Incoming) -> Job | None:
        """A job for an encoder that the caller may touch; None for another task."""
        job = self.encoding.jobs.get(id)
        if job is not None and not _may_touch(call, job):
            raise AccessDenied(f"task {id} belongs to another tenant")
        return job

    def _task(self, id: int, call: Incoming) -> Task:
        """A task that the caller may touch."""
        task = self.core.tasks.get(id)
        if id in self.encoding.jobs:
            raise NotSupported(f"task {id} encodes texts: it can be killed, not paused")
        if task is None:
            raise NotFound(f"there is no task {id}")
        if not _may_touch(call, task):
            raise AccessDenied(f"task {id} belongs to another tenant")
        return task


def _check_band(call: Incoming, band: Band) -> None:
    grant = call.origin.grant
    if not grant.may_run_in(band):
        raise AccessDenied(f"this capability does not reach band {band!r}, only {grant.band!r}")


def _may_touch(call: Incoming, task: Task | Job) -> bool:
    grant = call.origin.grant
    return task.tenant == grant.tenant or "scheduler.any_tenant" in grant.calls


def _check_fit(model: LoadedModel, request: Submit, limit: int) -> None:
    """Refuse what this model or its arena could never hold."""
    if not request.tokens or request.max_tokens < 1:
        raise InvalidArgument("a task needs at least one prompt token and max_tokens of at least 1")
    if limit > model.max_context:
        raise InvalidArgument(
            f"{len(request.tokens)} prompt tokens and {request.max_tokens} more exceed the context of "
            f"{model.max_context}",
            limit=model.max_context,
            tokens=limit,
        )
    if limit > model.pages * model.page_tokens:
        raise InvalidArgument(f"{limit} tokens do not fit in {model.pages} pages of {model.page_tokens}")
    if not 0 <= request.prompt <= len(request.tokens):
        raise InvalidArgument(f"prompt is {request.prompt}, not in 0..{len(request.tokens)}")
    if len(request.context) > CONTEXT_BYTES:
        raise InvalidArgument(f"a context of {len(request.context)} bytes exceeds {CONTEXT_BYTES}")
    if len(request.stop) > STOP_LIMIT:
        raise InvalidArgument(f"at most {STOP_LIMIT} stop tokens, not {len(request.stop)}")
    check_sampling(request.sampling, model.vocab_size)
    ids = (*request.tokens, *request.stop)
    if min(ids, default=0) < 0 or max(ids, default=0) >= model.vocab_size:
        raise InvalidArgument(f"a token id is not below the vocabulary size {model.vocab_size}")


_STATES: dict[Place, State] = {Place.RUNNING: "running", Place.STOPPED: "stopped"}


def _line(task: Task, host: Host | None) -> TaskLine:
    return TaskLine(
        task=task.id,
        tenant=task.tenant,
        principal=task.principal,
        model=adapters.served(task.model, task.adapter),
        driver=host.driver if host else "",
        band=task.band,
        state=_STATES.get(task.place, "waiting"),
        prompt_tokens=task.prompt,
        completion_tokens=task.produced,
        max_tokens=task.limit - task.prompt,
        pages=len(task.pages),
        age=now() - task.arrived,
        label=task.label,
    )


def _host_line(host: Host, idle: float) -> HostLine:
    return HostLine(
        driver=host.driver,
        model=host.model.model,
        replica=host.replica,
        running=len(host.running),
        slots=host.model.slots,
        steps=host.steps,
        tokens=host.tokens,
        step_micros=host.step_micros,
        idle=idle,
    )

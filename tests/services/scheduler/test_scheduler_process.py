"""The scheduler with real memory, a real kernel and the null driver: tokens come out right whatever dies."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest

from llmos.drivers.null.driver import next_token, vector
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.client import Client
from llmos.ipc.errors import (
    AccessDenied,
    Busy,
    Canceled,
    InvalidArgument,
    NotFound,
    NotSupported,
    TimedOut,
)
from llmos.ipc.grant import Grant
from llmos.ipc.header import Kind
from llmos.services.manifest import DriverSpec, Manifest
from llmos.services.memory.messages import Usage
from llmos.services.scheduler.messages import (
    Emitted,
    Encode,
    Encoded,
    Finished,
    Host,
    Kill,
    Nice,
    Pause,
    Rows,
    SchedulerStats,
    Submit,
    Tasks,
    Tokens,
    Unhost,
)
from tests.conftest import System, wait_until

GRANTS = {
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", "driver.null0.*"]
    ),
    "driver.null0": Grant(principal="driver.null0", tenant="system", serves="driver.null0"),
    "user": Grant(
        principal="user",
        tenant="a",
        models=["*"],
        band="realtime",
        calls=["scheduler.*", "kernel.*", "memory.usage", "driver.null0.load"],
    ),
    "metered": Grant(
        principal="metered", tenant="c", models=["*"], calls=["scheduler.*"], tokens_per_minute=100
    ),
    "queued": Grant(principal="queued", tenant="d", models=["*"], calls=["scheduler.*"], max_queued=2),
    "batch": Grant(principal="batch", tenant="b", models=["m"], band="batch", calls=["scheduler.*"]),
}


def expected(prompt: list[int], count: int) -> list[int]:
    """What the null driver generates after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Bench:
    """The system under test, and the ways to use it."""

    def __init__(
        self,
        system: System,
        slots: int = 4,
        pages: int = 256,
        step_ms: float = 0.0,
        burst: int = 1,
        replicas: int = 1,
    ) -> None:
        self.system = system
        self.load = LoadRequest(
            model="m",
            source="",
            slots=slots,
            pages=pages,
            page_tokens=4,
            max_context=512,
            chunk_tokens=16,
            mesh={"data": replicas},
        )
        options: dict[str, str | int | float | bool] = {"step_ms": step_ms, "burst": burst, "encoder": "e"}
        driver = DriverSpec(name="null0", kind="null", options=options)
        system.write_manifest(Manifest(drivers=[driver], models=[]))
        system.kernel()
        self.start("memory")
        self.start("scheduler")
        self.start("driver.null0")
        system.wait_ready("memory", "scheduler", "driver.null0")
        self.user = system.client()
        self.host()

    def start(self, name: str) -> None:
        if name.startswith("driver."):
            self.system.spawn(name, "llmos.drivers.sdk", name.removeprefix("driver."))
        else:
            self.system.spawn(name, f"llmos.services.{name}")

    def host(self) -> LoadedModel:
        """What the models service does when a driver comes up."""
        loaded: LoadedModel = self.user.call("driver.null0.load", self.load, LoadedModel)
        self.user.call("scheduler.host", Host("null0", loaded))
        return loaded

    def host_encoder(self) -> None:
        load = LoadRequest(model="e", source="", max_context=64, chunk_tokens=64)
        self.user.call(
            "scheduler.host", Host("null0", self.user.call("driver.null0.load", load, LoadedModel))
        )

    def encode(self, texts: list[list[int]], client: Client | None = None, **more: Any) -> list[Any]:
        """Encode texts; each must come back once."""
        rows: dict[int, Any] = {}
        *chunks, _ = (client or self.user).stream(
            "scheduler.encode", Encode(model="e", texts=texts, **more), Rows, Encoded
        )
        for chunk in chunks:
            for index, row in zip(chunk.indices, struct.iter_unpack("<4f", chunk.data), strict=True):
                assert rows.setdefault(index, row) is row, "a text came back twice"
        return [rows[index] for index in range(len(texts))]

    def kill(self, name: str) -> None:
        process = self.system.processes.pop(name)
        process.kill()
        process.wait()

    def generate(self, prompt: list[int], count: int, client: Client | None = None, **more: Any) -> list[int]:
        """Submit a task and read its stream to the end; offsets must be gapless."""
        return list(self.stream(prompt, count, client, **more))

    def stream(
        self, prompt: list[int], count: int, client: Client | None = None, **more: Any
    ) -> Generator[int, None, None]:
        submit = Submit(model="m", tokens=prompt, max_tokens=count, **more)
        seen = 0
        for message in (client or self.user).stream("scheduler.submit", submit, Tokens):
            if isinstance(message, Tokens):
                assert message.offset == seen, "a token was lost or sent twice"
                seen += len(message.tokens)
                yield from message.tokens

    def usage(self) -> Any:
        (arena,) = self.user.call("memory.usage", None, Usage).arenas
        return arena


@pytest.fixture
def bench(system: Callable[[dict[str, Grant]], System]) -> Callable[..., Bench]:
    return lambda **options: Bench(system(GRANTS), **options)


def test_a_task_gets_exactly_the_tokens_of_its_prompt(bench: Callable[..., Bench]) -> None:
    b = bench()
    for prompt, count in (([1], 1), ([1, 2, 3], 20), (list(range(100)), 50), (list(range(200)), 300)):
        assert b.generate(prompt, count) == expected(prompt, count)


def test_a_stop_token_ends_a_task(bench: Callable[..., Bench]) -> None:
    b = bench()
    whole = expected([5, 6], 30)
    stop = whole[10]
    got = b.generate([5, 6], 30, stop=[stop])
    assert got == whole[: whole.index(stop) + 1]


def test_pages_come_back_and_prefixes_stay(bench: Callable[..., Bench]) -> None:
    b = bench()
    prompt = list(range(64))
    b.generate(prompt, 8)
    wait_until(lambda: b.usage().owned == 0, what="pages given back")
    usage = b.usage()
    assert usage.free + usage.cached + usage.owned == usage.total
    assert usage.cached >= 16
    *_, last = b.user.stream(
        "scheduler.submit", Submit(model="m", tokens=prompt, max_tokens=2), Tokens | dict
    )
    assert last["cached_tokens"] == 60


@pytest.mark.parametrize("replicas", [1, 2])
def test_many_tasks_share_slots_and_pages_and_all_end_right(
    bench: Callable[..., Bench], replicas: int
) -> None:
    b = bench(slots=4, pages=64, replicas=replicas)
    attach = b.user._link
    got: dict[int, list[int]] = {}
    ended: dict[int, Finished] = {}

    def tokens(answer: Answer) -> None:
        for item in codec.decode(answer.body, Emitted).tokens:
            assert item.offset == len(got.setdefault(item.call, []))
            got[item.call].extend(item.tokens)

    def done(calls: list[int], answer: Answer) -> None:
        assert answer.kind == Kind.END, answer.error
        ended[calls[0]] = codec.decode(answer.body, Finished)

    attach.call("scheduler.attach", codec.EMPTY, 0, tokens)
    prompts: dict[int, tuple[list[int], int]] = {}
    for number in range(60):
        prompt, count = [number, *range(number % 37)], 1 + number % 50
        calls: list[int] = []
        call = attach.call(
            "scheduler.submit",
            codec.encode(
                Submit(model="m", tokens=prompt, max_tokens=count, band=("batch", "interactive")[number % 2])
            ),
            0,
            partial(done, calls),
        )
        calls.append(call)
        prompts[call] = (prompt, count)
    wait_until(lambda: bool(b.user.call("kernel.stats")) and len(ended) == 60, what="60 tasks")
    for call, (prompt, count) in prompts.items():
        assert got[call] == expected(prompt, count)
    arenas = lambda: b.user.call("memory.usage", None, Usage).arenas  # noqa: E731
    wait_until(lambda: not any(arena.owned for arena in arenas()), what="pages given back")
    hosts = b.user.call("scheduler.stats", None, SchedulerStats).hosts
    assert [host.replica for host in hosts] == list(range(replicas))
    assert all(host.tokens > 100 for host in hosts), "the tasks are spread over the replicas"


def test_a_replica_is_a_host_and_an_arena_of_its_own(bench: Callable[..., Bench]) -> None:
    b = bench(slots=1, replicas=2)
    arenas = [arena.arena for arena in b.user.call("memory.usage", None, Usage).arenas]
    assert arenas == ["null0/m", "null0/m#1"]
    streams = [b.stream([number], 40) for number in (1, 2)]
    assert [list(tokens) for tokens in streams] == [expected([1], 40), expected([2], 40)]
    b.user.call("scheduler.unhost", Unhost("null0", "m"))
    assert not b.user.call("memory.usage", None, Usage).arenas


@pytest.mark.parametrize("burst", [1, 3], ids=["plain", "speculating"])
def test_a_higher_band_takes_the_slot_of_a_lower_one_which_continues_exactly(
    bench: Callable[..., Bench], burst: int
) -> None:
    b = bench(slots=1, step_ms=2, burst=burst)
    batch = b.system.client("batch")
    low = b.stream([1, 2], 200, batch, band="batch")
    first = next(low)
    assert b.generate([9, 9], 5) == expected([9, 9], 5)
    assert b.user.call("scheduler.stats", None, SchedulerStats).running == 1, "the batch task is still there"
    assert [first, *low] == expected([1, 2], 200)
    assert b.user.call("scheduler.stats", None, SchedulerStats).displaced >= 1


@pytest.mark.parametrize("burst", [1, 3], ids=["plain", "speculating"])
def test_tasks_continue_by_themselves_when_the_driver_is_killed(
    bench: Callable[..., Bench], burst: int
) -> None:
    b = bench(step_ms=2, burst=burst)
    reader = b.system.client()
    stream = b.stream([3, 4], 150, reader)
    first = next(stream)
    b.kill("driver.null0")
    b.start("driver.null0")
    b.system.wait_ready("driver.null0")
    b.host()
    assert [first, *stream] == expected([3, 4], 150)


def test_tasks_continue_by_themselves_when_memory_is_killed(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=2)
    reader = b.system.client()
    stream = b.stream([3, 4], 200, reader)
    first = next(stream)
    b.kill("memory")
    b.start("memory")
    assert [first, *stream] == expected([3, 4], 200)
    wait_until(lambda: b.usage().owned == 0, what="pages given back")
    assert b.generate([1, 2, 3], 40) == expected([1, 2, 3], 40)


def test_a_new_scheduler_finds_the_driver_clean(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=2, slots=1)
    stream = b.stream([3, 4], 200, b.system.client())
    next(stream)
    b.kill("scheduler")
    b.start("scheduler")
    b.system.wait_ready("scheduler")
    b.host()
    assert b.generate([1, 2, 3], 10) == expected([1, 2, 3], 10)
    assert b.usage().owned == 0


def test_killing_a_task_ends_its_stream_and_frees_its_pages(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=2)
    stream = b.stream([3, 4], 400, b.system.client())
    next(stream)
    (line,) = b.user.call("scheduler.tasks", None, Tasks).tasks
    assert (line.tenant, line.state, line.prompt_tokens) == ("a", "running", 2)
    b.user.call("scheduler.kill", {"task": line.task})
    with pytest.raises(Canceled):
        list(stream)
    wait_until(lambda: b.usage().owned == 0, what="pages given back")


def test_leaving_a_stream_kills_the_task(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=2)
    stream = b.stream([3, 4], 400)
    next(stream)
    stream.close()
    wait_until(lambda: not b.user.call("scheduler.tasks", None, Tasks).tasks, what="the task's end")


def test_what_can_never_be_served_is_refused_at_once(bench: Callable[..., Bench]) -> None:
    b = bench()
    batch = b.system.client("batch")
    with pytest.raises(InvalidArgument, match="context of 512"):
        b.generate([1] * 500, 100)
    with pytest.raises(InvalidArgument, match="at least one prompt token"):
        b.generate([], 5)
    with pytest.raises(InvalidArgument, match="vocabulary"):
        b.generate([256], 5)
    with pytest.raises(AccessDenied, match="band"):
        b.generate([1], 5, batch, band="interactive")
    with pytest.raises(AccessDenied, match="does not allow the model"):
        list(batch.stream("scheduler.submit", Submit(model="other", tokens=[1], max_tokens=1, band="batch")))
    with pytest.raises(NotFound, match="no driver serves"):
        list(b.user.stream("scheduler.submit", Submit(model="other", tokens=[1], max_tokens=1)))


@pytest.mark.parametrize("burst", [1, 3], ids=["plain", "speculating"])
def test_a_stopped_task_gives_up_its_slot_and_continues_exactly(
    bench: Callable[..., Bench], burst: int
) -> None:
    b = bench(slots=1, step_ms=2, burst=burst)
    stream = b.stream([3, 4], 200, b.system.client())
    first = next(stream)
    (line,) = b.user.call("scheduler.tasks", None, Tasks).tasks
    b.user.call("scheduler.pause", {"task": line.task})
    assert b.user.call("scheduler.tasks", None, Tasks).tasks[0].state == "stopped"
    assert b.generate([9], 5) == expected([9], 5)
    b.user.call("scheduler.cont", {"task": line.task})
    assert [first, *stream] == expected([3, 4], 200)


def test_a_task_changes_its_band_up_to_the_ceiling_of_who_asks(bench: Callable[..., Bench]) -> None:
    b = bench(slots=1, step_ms=2)
    batch = b.system.client("batch")
    stream = b.stream([3, 4], 200, batch, band="batch")
    next(stream)
    other = b.system.client("batch")
    (line,) = other.call("scheduler.tasks", None, Tasks).tasks
    with pytest.raises(AccessDenied, match="does not reach"):
        other.call("scheduler.nice", {"task": line.task, "band": "realtime"})
    with pytest.raises(AccessDenied, match="another tenant"):
        b.system.client("metered").call("scheduler.nice", {"task": line.task, "band": "interactive"})
    with pytest.raises(NotFound):
        other.call("scheduler.nice", {"task": 999, "band": "batch"})
    stream.close()


def test_tokens_per_minute_are_metered_and_what_is_left_is_given_back(bench: Callable[..., Bench]) -> None:
    b = bench()
    metered = b.system.client("metered")
    stop = expected([1], 1)
    assert b.generate([1], 90, metered, stop=stop) == stop
    b.generate([1, 2], 60, metered)
    with pytest.raises(Busy, match="100 tokens_per_minute") as refusal:
        b.generate([1], 80, metered)
    assert 0 < float(str(refusal.value.details["retry_after"])) < 60
    assert refusal.value.details["exceeded"] == "tokens_per_minute"
    with pytest.raises(AccessDenied, match="may take 121"):
        b.generate([1], 120, metered)


def test_tokens_per_minute_outlive_the_scheduler(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.generate([1], 90, b.system.client("metered"))
    b.kill("scheduler")
    b.start("scheduler")
    b.system.wait_ready("scheduler")
    b.host()
    with pytest.raises(Busy, match="100 tokens_per_minute"):
        b.generate([1], 80, b.system.client("metered"))


def test_who_is_held_for_a_prefix_or_stopped_counts_as_waiting(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=20)
    client = b.system.client("queued")
    ended: dict[int, Answer] = {}

    def submit(prompt: list[int]) -> int:
        body = codec.encode(Submit(model="m", tokens=prompt, max_tokens=100))
        calls: list[int] = []
        calls.append(client._link.call("scheduler.submit", body, 0, lambda a: ended.update({calls[0]: a})))
        return calls[0]

    same = [submit([7] * 400) for _ in range(4)]
    lines = client.call("scheduler.tasks", None, Tasks).tasks
    assert len(lines) == 3, "one computes the prompt, and two may wait for it"
    assert isinstance(ended[same[3]].error, Busy)
    for line in lines:
        client.call("scheduler.pause", Pause(line.task))
    refused = submit([9])
    client.call("scheduler.tasks")
    error = ended[refused].error
    assert error is not None
    assert error.details["exceeded"] == "max_queued"


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=10)
    b.generate([1], 8)
    submit = Submit(model="m", tokens=[1], max_tokens=400, band="realtime")
    with pytest.raises(TimedOut, match="cannot be kept") as refusal:
        list(b.user.stream("scheduler.submit", submit, Tokens, timeout=1.0))
    assert float(str(refusal.value.details["earliest"])) > 3


TEXTS = [[i % 97 + 1] * (i % 60 + 1) for i in range(200)]
VECTORS = [tuple(vector(text, [])) for text in TEXTS]


def test_an_encoder_and_a_decoder_share_a_driver(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=1.0)
    b.host_encoder()
    other, got = b.system.client(), []
    encoding = threading.Thread(target=lambda: got.extend(b.encode(TEXTS, other)))
    encoding.start()
    assert b.generate([1, 2, 3], 60) == expected([1, 2, 3], 60)
    encoding.join(20)
    assert got == VECTORS
    b.host()  # which empties the decoder's slots, and must not disturb the encoder
    assert b.encode(TEXTS[:3]) == VECTORS[:3]


def test_a_job_for_an_encoder_survives_its_driver(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=5.0)
    b.host_encoder()
    other, got = b.system.client(), []
    encoding = threading.Thread(target=lambda: got.extend(b.encode(TEXTS, other)))
    encoding.start()
    wait_until(lambda: _steps(b) > 2, what="the first steps")
    b.kill("driver.null0")
    b.start("driver.null0")
    b.system.wait_ready("driver.null0")
    b.host_encoder()
    encoding.join(20)
    assert got == VECTORS


def test_a_job_is_listed_moved_and_killed_like_a_task_but_not_paused(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=20.0)
    b.host_encoder()
    other = b.system.client()
    stream = other.stream("scheduler.encode", Encode(model="e", texts=TEXTS, label="mine"), Rows)
    next(stream)
    (line,) = b.user.call("scheduler.tasks", None, Tasks).tasks
    assert (line.label, line.driver, line.state, line.pages) == ("mine", "null0", "running", 0)
    assert line.prompt_tokens == sum(map(len, TEXTS))
    b.user.call("scheduler.nice", Nice(line.task, "batch"))
    with pytest.raises(NotSupported, match="killed, not paused"):
        b.user.call("scheduler.pause", Pause(line.task))
    with pytest.raises(AccessDenied, match="another tenant"):
        b.system.client("batch").call("scheduler.kill", Kill(line.task))
    b.user.call("scheduler.kill", Kill(line.task))
    with pytest.raises(Canceled):
        list(stream)
    wait_until(lambda: not b.user.call("scheduler.tasks", None, Tasks).tasks, what="the end of the job")


def test_a_caller_that_leaves_withdraws_its_job(bench: Callable[..., Bench]) -> None:
    b = bench(step_ms=20.0)
    b.host_encoder()
    for _ in b.user.stream("scheduler.encode", Encode(model="e", texts=TEXTS), Rows):
        break
    wait_until(lambda: not b.user.call("scheduler.tasks", None, Tasks).tasks, what="the end of the job")


def _steps(b: Bench) -> int:
    hosts = b.user.call("scheduler.stats", None, SchedulerStats).hosts
    return max((host.steps for host in hosts if host.model == "e"), default=0)

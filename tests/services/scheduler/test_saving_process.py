"""Tasks leave the system as files and come back: real processes, a real kernel, the null driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.drivers.sdk.messages import LoadedModel, LoadRequest, OpenTask, Sampling, TaskOpened
from llmos.ipc import codec
from llmos.ipc.errors import Busy, Canceled, IOFailure, NotFound
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest
from llmos.services.scheduler.messages import (
    Finished,
    Host,
    Resume,
    Save,
    Saved,
    Submit,
    Tasks,
    TaskState,
    Tokens,
    Unhost,
)
from tests.conftest import System, wait_until
from tests.services.scheduler.test_scheduler_process import expected

DRIVERS = ("null0", "null1")
PROMPT = list(range(1, 31))
COUNT = 60
GRANTS = {
    "security": Grant(principal="security", tenant="system", serves="security", calls=["kernel.revoke"]),
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler",
        calls=["memory.*", "driver.null0.*", "driver.null1.*"],
    ),
    "user": Grant(
        principal="user", tenant="a", models=["*"], band="realtime",
        calls=["scheduler.*", "kernel.*", "driver.null0.*", "driver.null1.*"],
    ),
    **{
        f"driver.{name}": Grant(
            principal=name, tenant="system", serves=f"driver.{name}", calls=["security.storage_key"]
        )
        for name in DRIVERS
    },
}  # fmt: skip


class Bench:
    """A system with two drivers; the model is on one of them at a time."""

    def __init__(self, net: System, move_us: float = 0.0) -> None:
        self.net = net
        specs = [
            DriverSpec(name=name, kind="null", options={"step_ms": 5.0, "move_us": move_us})
            for name in DRIVERS
        ]
        net.write_manifest(Manifest(drivers=specs, models=[]))
        net.kernel()
        for name in ("security", "memory", "scheduler"):
            net.spawn(name, f"llmos.services.{name}")
        for name in DRIVERS:
            net.spawn(f"driver.{name}", "llmos.drivers.sdk", name)
        net.wait_ready("security", "memory", "scheduler", *(f"driver.{name}" for name in DRIVERS))
        self.user = net.client()
        self.streams: list[Any] = []  # a stream that is forgotten cancels its task

    @property
    def folder(self) -> Path:
        return self.net.run / "state" / "saved"

    def host(self, driver: str, **more: Any) -> None:
        load = LoadRequest(
            model="m", source="", slots=2, pages=64, max_context=256,
            **{"page_tokens": 4, "chunk_tokens": 16} | more,
        )  # fmt: skip
        loaded = self.user.call(f"driver.{driver}.load", load, LoadedModel)
        self.user.call("scheduler.host", Host(driver, loaded))

    def begin(self, count: int = 5, **more: Any) -> tuple[Iterator[Any], list[int]]:
        """A task that has produced some tokens, and these."""
        submit = Submit(model="m", tokens=PROMPT, max_tokens=COUNT, context=b"mine", **more)
        stream = self.net.client().stream("scheduler.submit", submit, Tokens, end=Finished)
        said: list[int] = []
        while len(said) < count:
            said += next(stream).tokens
        self.streams.append(stream)
        return stream, said

    def save(self) -> Saved:
        (line,) = self.user.call("scheduler.tasks", None, Tasks).tasks
        return self.user.call("scheduler.save", Save(line.task), Saved)

    def open(self, name: str, driver: str = "null0", tenant: str = "a") -> TaskState:
        opened = self.user.call(f"driver.{driver}.open", OpenTask(name, tenant), TaskOpened)
        return codec.decode(opened.state, TaskState)

    def go_on(self, state: TaskState, name: str) -> tuple[list[int], Finished]:
        """What models does: the tokens that are produced now, and the end."""
        submit = Submit(
            model="m", tokens=state.tokens, max_tokens=state.limit - len(state.tokens), prompt=state.prompt,
            sampling=state.sampling, stop=state.stop, resume=Resume(name, state.computed),
        )  # fmt: skip
        *chunks, end = self.user.stream("scheduler.submit", submit, Tokens, end=Finished)
        assert chunks[0].offset == len(state.tokens) - state.prompt
        return [token for chunk in chunks for token in chunk.tokens], end


@pytest.fixture
def bench(system: Callable[[dict[str, Grant]], System]) -> Iterator[Bench]:
    made = Bench(system(GRANTS))
    yield made
    for stream in made.streams:
        stream.close()


def check_whole(state: TaskState, rest: list[int]) -> None:
    assert [*state.tokens[len(PROMPT) :], *rest] == expected(PROMPT, COUNT)


def test_a_saved_task_goes_on_exactly_with_its_kv(bench: Bench) -> None:
    bench.host("null0")
    sampling = Sampling(temperature=0.5, seed=77, top_k=3)
    stream, said = bench.begin(sampling=sampling, stop=[300 - 50], band="batch")
    done = bench.save()
    with pytest.raises(Canceled, match="saved to a file"):
        said += [token for chunk in stream for token in chunk.tokens]
    assert bench.user.call("scheduler.tasks", None, Tasks).tasks == []
    state = bench.open(done.name)
    assert (bench.folder / done.name).stat().st_size == done.bytes
    assert (state.prompt, state.limit, state.band) == (30, 90, "batch")
    assert (state.sampling, state.stop, state.context) == (sampling, [250], b"mine")
    assert state.tokens[30:][: len(said)] == said
    assert done.pages == -(-state.computed // 4) > 0
    bench.host("null0", chunk_tokens=32)
    rest, end = bench.go_on(state, done.name)
    check_whole(state, rest)
    assert end.cached_tokens >= state.computed - 1, "the KV was read and not computed again"
    assert (end.prompt_tokens, end.completion_tokens) == (30, 60)


def test_it_goes_on_under_another_driver(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    done = bench.save()
    bench.user.call("scheduler.unhost", Unhost("null0", "m"))
    bench.host("null1")
    state = bench.open(done.name, "null1")
    rest, end = bench.go_on(state, done.name)
    check_whole(state, rest)
    assert end.cached_tokens >= state.computed - 1


def test_where_the_pages_do_not_fit_the_kv_is_computed_again(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    done = bench.save()
    bench.host("null0", page_tokens=8)
    state = bench.open(done.name)
    rest, end = bench.go_on(state, done.name)
    check_whole(state, rest)
    assert end.cached_tokens == 0


def test_changed_pages_are_not_used(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    done = bench.save()
    path = bench.folder / done.name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    bench.host("null0", chunk_tokens=32)
    state = bench.open(done.name)
    rest, end = bench.go_on(state, done.name)
    check_whole(state, rest)
    assert end.cached_tokens == 0
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IOFailure):
        bench.open(done.name)


def test_another_tenant_cannot_open_it(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    done = bench.save()
    with pytest.raises(IOFailure, match="another tenant"):
        bench.open(done.name, tenant="b")


def test_a_task_that_waits_is_saved_without_pages(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    (line,) = bench.user.call("scheduler.tasks", None, Tasks).tasks
    bench.user.call("scheduler.pause", {"task": line.task})
    bench.host("null0", chunk_tokens=32)
    done = bench.save()
    assert done.pages == 0
    state = bench.open(done.name)
    rest, _ = bench.go_on(state, done.name)
    check_whole(state, rest)


def test_what_cannot_be_saved_is_not_lost(bench: Bench) -> None:
    bench.host("null0")
    stream, said = bench.begin()
    bench.folder.parent.mkdir(exist_ok=True)
    (bench.folder.parent / "saved").write_text("in the way")
    (line,) = bench.user.call("scheduler.tasks", None, Tasks).tasks
    with pytest.raises(IOFailure, match="saved"):
        bench.save()
    bench.user.call("scheduler.cont", {"task": line.task})
    said += [token for chunk in stream if isinstance(chunk, Tokens) for token in chunk.tokens]
    assert said == expected(PROMPT, COUNT)


def test_a_task_that_no_driver_could_write_goes_on_waiting(bench: Bench) -> None:
    bench.host("null0")
    bench.begin()
    bench.user.call("scheduler.unhost", Unhost("null0", "m"))
    with pytest.raises(Busy, match="no driver has the model"):
        bench.save()
    assert len(bench.user.call("scheduler.tasks", None, Tasks).tasks) == 1
    with pytest.raises(NotFound):
        bench.user.call("scheduler.save", Save(999))


def test_a_client_needs_no_file_for_a_task_that_goes_on(bench: Bench) -> None:
    bench.host("null0")
    known = [*PROMPT, *expected(PROMPT, 10)]
    submit = Submit(model="m", tokens=known, prompt=len(PROMPT), max_tokens=COUNT - 10)
    *chunks, end = bench.user.stream("scheduler.submit", submit, Tokens, end=Finished)
    assert known[30:] + [token for chunk in chunks for token in chunk.tokens] == expected(PROMPT, COUNT)
    assert (end.prompt_tokens, end.completion_tokens) == (30, 60)


def test_a_driver_that_dies_while_it_reads_a_file_loses_nothing(
    system: Callable[[dict[str, Grant]], System],
) -> None:
    bench = Bench(system(GRANTS), move_us=200_000.0)
    bench.host("null0")
    bench.begin()
    done = bench.save()
    bench.host("null0", chunk_tokens=32)
    bench.host("null1")
    state = bench.open(done.name, "null1")
    submit = Submit(
        model="m", tokens=state.tokens, max_tokens=state.limit - len(state.tokens), prompt=state.prompt,
        resume=Resume(done.name, state.computed),
    )  # fmt: skip
    result: list[Any] = []
    client = bench.net.client()
    asking = threading.Thread(
        target=lambda: result.extend(client.stream("scheduler.submit", submit, Tokens, end=Finished))
    )
    asking.start()
    tasks = lambda: bench.user.call("scheduler.tasks", None, Tasks).tasks  # noqa: E731
    wait_until(lambda: any(task.driver for task in tasks()), what="a task with a driver")
    process = bench.net.processes.pop(f"driver.{tasks()[0].driver}")
    process.kill()
    process.wait()
    asking.join(60)
    *chunks, end = result
    check_whole(state, [token for chunk in chunks for token in chunk.tokens])
    assert end.completion_tokens == COUNT

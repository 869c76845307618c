"""The asyncio client against a real kernel."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmos.ipc import paths
from llmos.ipc.aio import AsyncClient
from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, HostDown, InvalidArgument, NotFound, NotSupported, TimedOut
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Verified, Verify

USER_CALLS = ["echo.say", "echo.count", "echo.hang", "echo.fail", "echo.none", "kernel.names", "late.say"]
GRANTS = {
    "echo": Grant(principal="echo", tenant="system", serves="echo"),
    "late": Grant(principal="late", tenant="system", serves="late"),
    "security": Grant(principal="security", tenant="system", serves="security"),
    "user": Grant(principal="user", tenant="local", calls=USER_CALLS),
    "web": Grant(principal="web", tenant="system", calls=["kernel.names"], serves="web"),
    "caller": Grant(principal="caller", tenant="local", calls=["web.anything"]),
}


class Count(msgspec.Struct, frozen=True):
    n: int


class Echo(Server):
    name = "echo"

    def start(self) -> None:
        self.canceled = threading.Event()

    @method
    def say(self, request: str, call: Incoming) -> str:
        return f"{call.origin.grant.principal}:{request}"

    @method
    def count(self, request: Count, call: Incoming) -> Later:
        for i in range(request.n):
            call.chunk(i)
        call.end("done")
        return Later()

    @method
    def hang(self, request: None, call: Incoming) -> Later:
        call.chunk("waiting")
        call.on_cancel = self.canceled.set
        return Later()

    @method
    def fail(self, request: None, call: Incoming) -> None:
        raise NotFound("nothing here", what="it")


class Late(Server):
    name = "late"

    @method
    def say(self, request: str, call: Incoming) -> str:
        return request


class Security(Server):
    """Takes any token of the form "key-NAME"; refuses what is in ``revoked``."""

    name = "security"
    revoked: frozenset[str] = frozenset()

    @method
    def verify(self, request: Verify, call: Incoming) -> Verified:
        if not request.token.startswith("key-") or request.token in self.revoked:
            raise AccessDenied("no such token")
        name = request.token.removeprefix("key-")
        return Verified(Grant(principal=name, tenant=name, calls=["echo.say"]))


@pytest.fixture(scope="module")
def world(systems: Callable[[dict[str, Grant]], Any]) -> Any:
    world = systems(GRANTS)
    world.kernel()
    world.echo = world.serve(Echo(world.run))
    world.security = world.serve(Security(world.run))
    world.wait_ready("echo", "security")
    return world


@pytest.fixture(scope="module")
def systems() -> Iterator[Callable[[dict[str, Grant]], Any]]:
    from tests.conftest import System

    made: list[Any] = []

    def make(grants: dict[str, Grant]) -> Any:
        made.append(System(Path(tempfile.mkdtemp(prefix="llmos-t")), grants))
        return made[-1]

    yield make
    for each in made:
        each.close()
        shutil.rmtree(each.run, ignore_errors=True)


def with_client(world: Any, work: Callable[[AsyncClient], Awaitable[Any]], name: str = "user") -> Any:
    async def main() -> Any:
        async with AsyncClient(paths.read_token(name, world.run), run=world.run, timeout=10) as client:
            return await work(client)

    return asyncio.run(main())


def test_it_calls_and_gets_typed_answers_and_errors(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        assert await client.call("echo.say", "hi") == "user:hi"
        assert await client.call("echo.say", "hi", str) == "user:hi"
        assert client.grant().tenant == "local"
        with pytest.raises(NotFound, match="nothing here") as caught:
            await client.call("echo.fail")
        assert caught.value.details == {"what": "it"}
        with pytest.raises(NotSupported):
            await client.call("echo.none")
        with pytest.raises(InvalidArgument):
            await client.call("echo.say", 3)
        with pytest.raises(AccessDenied):
            await client.call("echo.secret")

    with_client(world, work)


def test_many_calls_run_at_once_and_each_gets_its_own_answer(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        answers = await asyncio.gather(*[client.call("echo.say", str(i)) for i in range(2000)])
        assert answers == [f"user:{i}" for i in range(2000)]
        assert len(client.session.link.calls) == 0

    with_client(world, work)


def test_a_stream_yields_each_chunk_in_order_then_its_end(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        got = [item async for item in client.stream("echo.count", Count(5000))]
        assert got == [*range(5000), "done"]
        batches: list[Any] = []
        async with client.stream("echo.count", Count(5000)) as stream:
            while batch := await stream.batch():
                batches += batch
        assert batches == [*range(5000), "done"]

    with_client(world, work)


@pytest.mark.parametrize("way", ["break", "with", "task"])
def test_leaving_a_stream_cancels_its_call(world: Any, way: str) -> None:
    world.echo.canceled.clear()

    async def first(client: AsyncClient) -> None:
        async for item in client.stream("echo.hang"):
            assert item == "waiting"
            break

    async def work(client: AsyncClient) -> None:
        if way == "break":
            await first(client)
        elif way == "with":
            async with client.stream("echo.hang") as stream:
                assert await stream.__anext__() == "waiting"
        else:
            task = asyncio.ensure_future(client.call("echo.hang"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(client.session.link.calls) == 0
        assert await asyncio.to_thread(world.echo.canceled.wait, 5)

    with_client(world, work)


def test_a_call_ends_at_its_deadline(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        began = time.monotonic()
        with pytest.raises(TimedOut):
            await client.call("echo.hang", timeout=0.2)
        assert 0.15 < time.monotonic() - began < 2

    with_client(world, work)


def test_a_call_to_a_service_that_is_just_starting_waits_for_it(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        call = asyncio.ensure_future(client.call("late.say", "hello"))
        await asyncio.sleep(0.2)
        assert not call.done()
        world.serve(Late(world.run))
        assert await call == "hello"

    with_client(world, work)


def test_a_presented_token_makes_calls_in_its_own_name_until_released(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        ada, bob = await client.present("key-ada"), await client.present("key-bob")
        assert await client.call("echo.say", "hi", handle=ada) == "ada:hi"
        assert await client.call("echo.say", "hi", handle=bob) == "bob:hi"
        assert client.grant(bob).tenant == "bob"
        await client.release(ada)
        with pytest.raises(AccessDenied):
            await client.call("echo.say", "hi", handle=ada)
        with pytest.raises(AccessDenied, match="no such token"):
            await client.present("nonsense")

    with_client(world, work)


def test_a_bad_token_of_its_own_is_refused_at_once(world: Any) -> None:
    async def main() -> None:
        with pytest.raises(AccessDenied):
            await AsyncClient("nonsense", run=world.run, timeout=5).connect()

    asyncio.run(main())


def test_without_a_kernel_it_says_that_the_system_is_down(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(HostDown, match="llmos up"):
            await AsyncClient("x", run=tmp_path, timeout=0.2).connect()

    asyncio.run(main())


def test_a_call_to_the_name_it_serves_is_refused_rather_than_left_hanging(world: Any) -> None:
    async def work(client: AsyncClient) -> None:
        def ask() -> None:
            with Client(paths.read_token("caller", world.run), run=world.run, timeout=5) as other:
                other.call("web.anything")

        with pytest.raises(NotSupported):
            await asyncio.to_thread(ask)

    with_client(world, work, "web")


def test_it_survives_a_restart_of_the_kernel_and_presents_its_tokens_again(system: Any) -> None:
    world = system(GRANTS)
    world.kernel()
    echo = world.serve(Echo(world.run))
    world.serve(Security(world.run))
    world.wait_ready("echo", "security")

    async def work(client: AsyncClient) -> None:
        ada, bob = await client.present("key-ada"), await client.present("key-bob")
        await client.release(ada)  # so that handles differ from those the next kernel will give
        hanging = asyncio.ensure_future(client.call("echo.hang"))
        await asyncio.sleep(0.1)
        world.processes["kernel"].kill()
        world.processes["kernel"].wait()
        with pytest.raises(HostDown):
            await hanging
        world.kernel()
        eve = await client.present("key-eve")
        assert await client.call("echo.say", "x", handle=bob, timeout=10) == "bob:x"
        assert await client.call("echo.say", "x", handle=eve, timeout=10) == "eve:x"
        assert await client.call("echo.say", "x", timeout=10) == "user:x"
        # What was revoked meanwhile stays without rights.
        Security.revoked = frozenset({"key-bob"})
        client.session._lost()
        with pytest.raises(AccessDenied):
            await client.call("echo.say", "x", handle=bob, timeout=10)

    try:
        with_client(world, work)
    finally:
        Security.revoked = frozenset()
    assert echo.progress > 0


def test_chunks_flow_fast(world: Any) -> None:
    async def work(client: AsyncClient) -> float:
        began, n = time.perf_counter(), 20_000
        async for _ in client.stream("echo.count", Count(n)):
            pass
        return n / (time.perf_counter() - began)

    # Far below what it does, so that a busy machine passes, too.
    assert with_client(world, work) > 2000

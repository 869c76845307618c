"""Moves through real processes: the null driver under the kernel, with keys from security."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from llmos.drivers.null.driver import next_token
from llmos.drivers.sdk.messages import (
    Chunk,
    EncodeStep,
    LoadedModel,
    LoadRequest,
    Move,
    Moved,
    Park,
    Quantum,
    QuantumDone,
    Reset,
    SaveTask,
    Start,
    Step,
    Unload,
    Wake,
)
from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, Busy, InvalidArgument, IOFailure, LLMOSError, NotFound
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest
from tests.conftest import System

MODEL = LoadRequest(
    model="m", source="", slots=2, pages=16, page_tokens=4, max_context=64, chunk_tokens=16, host_pages=8,
    disk_pages=8,
)  # fmt: skip
KEY_RIGHT = ["security.storage_key"]
GRANTS = {
    "security": Grant(principal="security", tenant="system", serves="security", calls=["kernel.revoke"]),
    "driver.null0": Grant(
        principal="driver.null0", tenant="system", serves="driver.null0", calls=KEY_RIGHT
    ),
    "driver.null1": Grant(principal="driver.null1", tenant="system", serves="driver.null1"),
    "user": Grant(
        principal="user", tenant="a", calls=["driver.null0.*", "driver.null1.*", "kernel.names"], models=["*"]
    ),
}  # fmt: skip
PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture
def booted(system: Callable[[dict[str, Grant]], System]) -> System:
    one = system(GRANTS)
    specs = [
        DriverSpec(name=name, kind="null", options={"step_ms": 5.0, "move_us": 20_000.0})
        for name in ("null0", "null1")
    ]
    one.write_manifest(Manifest(drivers=specs, models=[]))
    one.kernel()
    one.spawn("security", "llmos.services.security")
    for name in ("null0", "null1"):
        one.spawn(f"driver.{name}", "llmos.drivers.sdk", name)
    one.wait_ready("security", "driver.null0", "driver.null1")
    for name in ("null0", "null1"):
        one.client().call(f"driver.{name}.load", MODEL, LoadedModel)
    return one


def execute(client: Client, id: int, steps: int, **fields: Any) -> list[Step]:
    quantum = Quantum(id=id, model="m", steps=steps, **fields)
    answers = client.stream("driver.null0.execute", quantum, Step, end=QuantumDone)
    return [answer for answer in answers if isinstance(answer, Step)]


def move(client: Client, source: Any, target: Any, *pairs: tuple[int, int], tenant: str = "a") -> Moved:
    body = Move(model="m", source=source, target=target, pages=list(pairs), tenant=tenant)
    return client.call("driver.null0.move", body, Moved)


def begin(client: Client) -> None:
    start = Start(slot=0, tokens=PROMPT, prompt=6, pages=[0, 1], limit=8)
    execute(client, 1, 1, start=[start], chunks=[Chunk(0, 0, 0, 6)])


def test_a_sequence_goes_on_after_its_pages_were_on_disk(booted: System) -> None:
    client = booted.client()
    begin(client)
    move(client, "device", "host", (0, 0), (1, 7))
    move(client, "host", "disk", (0, 5), (7, 6))
    moved = move(client, "disk", "device", (5, 10), (6, 11))
    assert moved.bytes == 2 * 24
    assert moved.micros >= 40_000
    known = [*PROMPT, next_token(PROMPT)]
    again = Start(slot=1, tokens=known, prompt=6, pages=[10, 11], cached=6, limit=9)
    (step,) = execute(client, 2, 1, start=[again], chunks=[Chunk(0, 1, 6, 1)])
    assert step.tokens == [next_token(known)]


def test_steps_go_on_while_pages_move(booted: System) -> None:
    client, other = booted.client(), booted.client()
    start = Start(slot=0, tokens=PROMPT, prompt=6, pages=list(range(12)), limit=40)
    execute(client, 1, 1, start=[start], chunks=[Chunk(0, 0, 0, 6)])
    ended = threading.Event()

    def moves() -> None:
        move(other, "device", "host", *((15, i) for i in range(8)))
        ended.set()

    moving = threading.Thread(target=moves)
    moving.start()
    done = 0
    while not ended.is_set() and done < 30:
        done += len(execute(client, 2 + done, 1, decode=[0]))
    moving.join()
    assert done > 5


def test_another_tenant_cannot_bring_back_what_is_on_disk(booted: System) -> None:
    client = booted.client()
    begin(client)
    move(client, "device", "disk", (0, 0))
    with pytest.raises(IOFailure, match="another tenant"):
        move(client, "disk", "device", (0, 2), tenant="b")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "n"}, NotFound),
        ({"pages": [(16, 0)]}, InvalidArgument),
        ({"target": "disk", "pages": [(0, 8)]}, InvalidArgument),
        ({"source": "moon"}, InvalidArgument),
    ],
)
def test_a_bad_move_is_refused(booted: System, fields: dict[str, Any], error: type[LLMOSError]) -> None:
    good = {"model": "m", "source": "device", "target": "host", "pages": [(0, 0)], "tenant": "a"}
    with pytest.raises(error):
        booted.client().call("driver.null0.move", good | fields)


def test_a_driver_without_the_right_to_keys_uses_no_disk(booted: System) -> None:
    body = Move(model="m", source="device", target="disk", pages=[(0, 0)], tenant="a")
    with pytest.raises(AccessDenied):
        booted.client().call("driver.null1.move", body)


def test_a_parked_model_says_so_and_goes_on_with_empty_slots_when_it_is_awake(booted: System) -> None:
    client = booted.client()
    begin(client)
    client.call("driver.null0.park", Park("m"), Moved)
    assert client.call("driver.null0.load", MODEL, LoadedModel).parked
    move_ = Move(model="m", source="device", target="host", pages=[(0, 0)], tenant="a")
    save = SaveTask(name="x", model="m", tenant="a", pages=[0], digest=b"", state=b"")
    for method, body in (
        ("execute", Quantum(id=9, model="m", steps=1, decode=[0])),
        ("encode", EncodeStep(model="m", texts=[[1]])),
        ("reset", Reset("m")),
        ("move", move_),
        ("save", save),
    ):
        with pytest.raises(Busy, match="parked: wake it"):
            client.call(f"driver.null0.{method}", body)
    assert client.call("driver.null0.wake", Wake("m"), Moved).bytes == 0
    assert not client.call("driver.null0.load", MODEL, LoadedModel).parked
    with pytest.raises(InvalidArgument, match="does not hold the KV"):
        execute(
            client,
            10,
            1,
            start=[Start(slot=0, tokens=[*PROMPT, 1], prompt=6, pages=[0, 1], cached=6, limit=9)],
        )
    begin(client)


def test_another_model_decodes_while_one_is_parked_and_unloading_it_then_is_fine(booted: System) -> None:
    client = booted.client()
    begin(client)
    with pytest.raises(NotFound):
        client.call("driver.null0.park", Park("n"))
    client.call("driver.null0.load", msgspec.structs.replace(MODEL, model="n"), LoadedModel)
    client.call("driver.null0.park", Park("n"), Moved)
    assert len(execute(client, 5, 1, decode=[0])) == 1
    client.call("driver.null0.unload", Unload("n"))
    assert not client.call("driver.null0.load", msgspec.structs.replace(MODEL, model="n"), LoadedModel).parked

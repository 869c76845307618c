"""The real gateway on a real kernel, with doubles of the services behind it."""

from __future__ import annotations

import asyncio
import logging
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai import DefaultHttpxClient, OpenAI

from llmos.ipc.errors import AccessDenied, Busy, HostDown, InvalidArgument, IOFailure, NotFound
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Stop, Verified, Verify
from llmos.services.gateway import server as gateway_server
from llmos.services.manifest import GatewaySpec, Manifest
from llmos.services.models.messages import (
    Chat,
    Complete,
    Done,
    Embed,
    Embedded,
    Generation,
    ModelLine,
    ModelList,
    Ranked,
    Rerank,
    Text,
)
from llmos.services.monitor.messages import Health, Snapshot
from llmos.services.scheduler.messages import Finished
from tests.conftest import System, wait_until

RIGHTS = ["models.chat", "models.complete", "models.embed", "models.rerank", "models.list"]
GRANTS = {
    "models": Grant(principal="models", tenant="system", serves="models"),
    "monitor": Grant(principal="monitor", tenant="system", serves="monitor"),
    "security": Grant(principal="security", tenant="system", serves="security"),
    "gateway": Grant(
        principal="gateway", tenant="system", serves="gateway", calls=["monitor.snapshot", "models.list"]
    ),
    "user": Grant(principal="user", tenant="local", calls=["kernel.names", "kernel.stop"]),
}


class FakeSecurity(Server):
    """Takes keys of the form "key-NAME"; "key-poor" may list, but not chat."""

    name = "security"

    def start(self) -> None:
        self.asked: list[str] = []

    @method
    def verify(self, request: Verify, call: Incoming) -> Verified:
        self.asked.append(request.token)
        if not request.token.startswith("key-"):
            raise AccessDenied("no such token")
        calls = ["models.list"] if request.token == "key-poor" else RIGHTS
        return Verified(Grant(principal=request.token, tenant="t", calls=calls, models=["*"]))


class FakeMonitor(Server):
    name = "monitor"

    def start(self) -> None:
        self.health = Health(ok=True, reasons=[])

    @method
    def snapshot(self, request: None, call: Incoming) -> Snapshot:
        return Snapshot(
            age=0.1, health=self.health, kernel=None, services=[], scheduler=None, arenas=[], models=[]
        )


ERRORS = {
    "long": InvalidArgument("the prompt has 9000 tokens", limit=2048, tokens=9000),
    "busy": Busy("the queue is full"),
    "later": Busy("the tokens are used up", retry_after=12.2),
    "down": HostDown("scheduler died before it answered", delivered=True),
    "hot": InvalidArgument("temperature must be 0 to 100, not 900", param="temperature"),
}


class FakeModels(Server):
    """Says the last message again, word by word; some words make it do something else."""

    name = "models"

    def start(self) -> None:
        self.canceled = threading.Event()
        self.requests: list[Chat | Complete] = []
        self.encodes: list[Embed | Rerank] = []

    @method
    def list(self, request: None, call: Incoming) -> ModelList:
        return ModelList([ModelLine(name="echo", state="ready", driver="d0", context=2048, created=7)])

    @method
    def chat(self, request: Chat, call: Incoming) -> Later:
        return self._say(request, request.messages[-1].content or "", request.generation, call)

    @method
    def complete(self, request: Complete, call: Incoming) -> Later:
        return self._say(request, str(request.prompt), request.generation, call)

    @method
    def embed(self, request: Embed, call: Incoming) -> Embedded:
        """Of each input the vector (its length, 0.5)."""
        self.encodes.append(request)
        if str(request.input[0]) in ERRORS:
            raise ERRORS[str(request.input[0])]
        rows = b"".join(struct.pack("<2f", len(text), 0.5) for text in request.input)
        return Embedded(model=request.model, width=2, vectors=rows, tokens=sum(map(len, request.input)))

    @method
    def rerank(self, request: Rerank, call: Incoming) -> Ranked:
        """The last documents first."""
        self.encodes.append(request)
        order = [(index, index / 10) for index in reversed(range(len(request.documents)))]
        return Ranked(model=request.model, results=order[: request.top_n or len(order)], tokens=9)

    def _say(self, request: Chat | Complete, text: str, generation: Generation, call: Incoming) -> Later:
        self.requests.append(request)
        if request.model != "echo":
            raise NotFound(f"no model {request.model!r} is served here; there is: echo")
        if text in ERRORS:
            raise ERRORS[text]
        if text == "dump":
            text = msgspec.json.encode(generation).decode()
        words = text.split(" ")
        for count, word in enumerate(words, 1):
            if generation.stream:
                call.chunk(Text(word if count == 1 else f" {word}", count))
            if word == "hang":
                call.on_cancel = self.canceled.set
                return Later()
            if word == "die":
                raise IOFailure("the driver failed to compute this answer")
        usage = Finished(
            task=1, reason="stop", prompt_tokens=10, cached_tokens=4, completion_tokens=len(words),
            queued=0.0, first_token=0.1, total=0.2,
        )  # fmt: skip
        call.end(Done(text=text, reason="stop", usage=usage))
        return Later()


class World(System):
    """A system, the gateway in a thread, and clients of it."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="llmos-t")), GRANTS)
        self.write_manifest(Manifest(gateway=GatewaySpec(port=0, max_body=100_000)))
        self._opened: list[httpx.Client | OpenAI] = []
        self._gateway = threading.Thread(target=lambda: asyncio.run(gateway_server.serve(self.run)))

    def start(self) -> None:
        self.kernel()
        self.models = FakeModels(self.run)
        self.security = FakeSecurity(self.run)
        self.monitor = FakeMonitor(self.run)
        for server in (self.models, self.security, self.monitor):
            self.serve(server)
        self.wait_ready("models", "security", "monitor")
        self._gateway.start()
        self.wait_ready("gateway")
        self.url = (self.run / "gateway.url").read_text()

    def http(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, trust_env=False, timeout=20)
        self._opened.append(client)
        return client

    def openai(self, key: str = "key-ada") -> OpenAI:
        client = OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20,
            http_client=DefaultHttpxClient(trust_env=False),
        )  # fmt: skip
        self._opened.append(client)
        return client

    def close(self) -> None:
        for client in self._opened:
            client.close()
        try:
            if self._gateway.is_alive():
                self.client().call("kernel.stop", Stop("gateway"))
                self._gateway.join(10)
                assert not self._gateway.is_alive(), "the gateway does not stop when told to"
                assert not (self.run / "gateway.url").exists()
        finally:
            super().close()


@pytest.fixture(scope="package")
def world() -> Iterator[Any]:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    world = World()
    try:
        world.start()
        yield world
    finally:
        world.close()
        shutil.rmtree(world.run, ignore_errors=True)


__all__ = ["wait_until"]

"""Requests played on one connection, with what came back when."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmos.ipc import codec, header
from llmos.ipc.calls import Answer
from llmos.ipc.client import Client
from llmos.ipc.grant import Band
from llmos.ipc.link import now as wall_now
from llmos.ipc.sockets import to_bytes
from llmos.services.scheduler.messages import Emitted, Submit


@dataclass
class Request:
    """One request: when it is sent (seconds from the start), and what came back when.

    ``earliest`` is what a refusal named: the deadline, in seconds from when it was sent, that could be kept.
    """

    band: Band
    tokens: list[int]
    count: int
    at: float = 0.0
    deadline: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    error: str = ""
    earliest: float = 0.0
    call: int = 0
    times: list[float] = field(default_factory=list)
    got: list[int] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether it was not admitted, for its deadline."""
        return bool(self.earliest)

    @property
    def missed(self) -> bool:
        """Whether it was admitted, and its deadline passed all the same."""
        return self.error in ("ETIMEDOUT", "ENOMEM") and not self.refused


class Play:
    """Plays requests on one connection."""

    def __init__(self, client: Client, model: str) -> None:
        self._link = client._link
        self._model = model
        self._calls: dict[int, Request] = {}
        self._link.call("scheduler.attach", codec.EMPTY, 0, self._on_tokens)

    def run(self, requests: Sequence[Request]) -> float:
        """Send each at its time, wait for all; the seconds that it took."""
        begun = time.perf_counter()
        waiting = [(request.at, index, request) for index, request in enumerate(requests)]
        heapq.heapify(waiting)
        while waiting or any(not request.ended for request in requests):
            while waiting and waiting[0][0] <= time.perf_counter() - begun:
                self.send(heapq.heappop(waiting)[2])
            self.poll(waiting[0][0] - (time.perf_counter() - begun) if waiting else 1.0)
        return time.perf_counter() - begun

    def poll(self, seconds: float) -> None:
        """Take in what has come, waiting so long at most for something."""
        self._link.socket.poll(max(0, int(seconds * 1e3)))
        for message in self._link.wire.drain(4096):
            frames = to_bytes(message)
            self._link.deliver(header.decode(frames[0]), frames)

    def withdraw(self, request: Request) -> None:
        """Kill a request that has not ended."""
        if not request.ended:
            self._link.cancel(request.call)
            request.ended = time.perf_counter()

    def send(self, request: Request) -> None:
        """Submit a request now."""
        body = codec.encode(
            Submit(model=self._model, tokens=request.tokens, max_tokens=request.count, band=request.band)
        )
        deadline = wall_now() + int(request.deadline * 1e6) if request.deadline else 0
        request.sent = time.perf_counter()
        call = self._link.call(
            "scheduler.submit", body, deadline, lambda answer: self._on_end(request, answer)
        )
        request.call = call
        self._calls[call] = request

    def _on_end(self, request: Request, answer: Answer) -> None:
        request.ended = time.perf_counter()
        if answer.error is not None:
            request.error = answer.error.code
            request.earliest = float(str(answer.error.details.get("earliest", 0.0)))

    def _on_tokens(self, answer: Answer) -> None:
        if answer.error is not None:
            raise answer.error
        now = time.perf_counter()
        for item in codec.decode(answer.body, Emitted).tokens:
            request = self._calls[item.call]
            request.times += [now] * len(item.tokens)
            request.got += item.tokens


def say(what: str) -> None:
    """Progress, beside the report."""
    print(what, file=sys.stderr, flush=True)

"""Urgent requests on a system that is full of batch work, against the same requests on an idle one.

    python -m benchmarks.preemption [--driver null|jax --model MODEL.gguf] [--json FILE]

The real kernel, memory, scheduler and driver process. Batch work takes every slot and needs more pages than
there are; realtime requests (with deadlines) and interactive ones come at fixed times. Reported: time to
first token by band, the deadlines kept, how much longer the batch took beyond the steps that the urgent work
itself needs, and whether every batch task produced the tokens that it produces undisturbed.
"""

from __future__ import annotations

import heapq
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cluster import DRIVER, Cluster
from benchmarks.report import Report, arguments
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc import codec, header
from llmos.ipc.calls import Answer
from llmos.ipc.client import Client
from llmos.ipc.grant import Band
from llmos.ipc.link import now as wall_now
from llmos.ipc.sockets import to_bytes
from llmos.services.manifest import DriverSpec
from llmos.services.scheduler.messages import Emitted, SchedulerStats, Submit

# An 8B model on an H200 takes 4.6 ms a step, 13.4 with a full batch, and 21 us for a prompt token.
STEP_MS, FULL_MS, PREFILL_US = 4.6, 13.4, 21.0


@dataclass
class Request:
    """One request: when it is sent (seconds from the start), and what came back when."""

    band: Band
    tokens: list[int]
    count: int
    at: float = 0.0
    deadline: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    error: str = ""
    times: list[float] = field(default_factory=list)
    got: list[int] = field(default_factory=list)


class Play:
    """Plays requests on one connection."""

    def __init__(self, client: Client, model: str) -> None:
        self._link = client._link
        self._model = model
        self._calls: dict[int, Request] = {}
        self._link.call("scheduler.attach", codec.EMPTY, 0, self._on_tokens)

    def run(self, requests: list[Request]) -> float:
        """Send each at its time, wait for all; the seconds that it took."""
        begun = time.perf_counter()
        waiting = [(request.at, index, request) for index, request in enumerate(requests)]
        heapq.heapify(waiting)
        while waiting or any(not request.ended for request in requests):
            while waiting and waiting[0][0] <= time.perf_counter() - begun:
                self._send(heapq.heappop(waiting)[2])
            pause = waiting[0][0] - (time.perf_counter() - begun) if waiting else 1.0
            self._link.socket.poll(max(0, int(pause * 1e3)))
            for message in self._link.wire.drain(4096):
                frames = to_bytes(message)
                self._link.deliver(header.decode(frames[0]), frames)
        return time.perf_counter() - begun

    def _send(self, request: Request) -> None:
        body = codec.encode(
            Submit(model=self._model, tokens=request.tokens, max_tokens=request.count, band=request.band)
        )
        deadline = wall_now() + int(request.deadline * 1e6) if request.deadline else 0
        request.sent = time.perf_counter()
        call = self._link.call(
            "scheduler.submit", body, deadline, lambda answer: self._on_end(request, answer)
        )
        self._calls[call] = request

    def _on_end(self, request: Request, answer: Answer) -> None:
        request.ended = time.perf_counter()
        request.error = answer.error.code if answer.error is not None else ""

    def _on_tokens(self, answer: Answer) -> None:
        if answer.error is not None:
            raise answer.error
        now = time.perf_counter()
        for item in codec.decode(answer.body, Emitted).tokens:
            request = self._calls[item.call]
            request.times += [now] * len(item.tokens)
            request.got += item.tokens


def traffic(model: LoadedModel, options: Any) -> tuple[list[Request], list[Request]]:
    """Batch work for several full batches, and urgent requests spread over the time that it takes."""
    rng = random.Random(5)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(model.vocab_size) for _ in range(length)]

    batch = [
        Request("batch", prompt(options.prompt), options.count)
        for _ in range(round(options.batches * model.slots))
    ]
    urgent = [
        Request(
            ("realtime", "interactive")[i % 2], prompt(options.prompt), options.urgent_count,
            at=options.begin + i * options.every, deadline=options.deadline if i % 2 == 0 else 0.0,
        )
        for i in range(options.urgent)
    ]  # fmt: skip
    return batch, urgent


def again(requests: list[Request]) -> list[Request]:
    return [Request(r.band, r.tokens, r.count, r.at, r.deadline) for r in requests]


def measure(play: Play, client: Client, model: LoadedModel, options: Any) -> dict[str, Any]:
    """Idle, batch alone, and both; each on the same requests."""
    batch, urgent = traffic(model, options)
    play.run([Request("batch", list(range(1, 100 + i)), 8) for i in range(min(8, model.slots))])
    play.run(again(urgent))
    play.run(again(batch))  # compiles, and fills the prefix cache alike for what is measured
    idle = again(urgent)
    play.run(idle)
    alone = again(batch)
    alone_seconds = play.run(alone)
    before = client.call("scheduler.stats", None, SchedulerStats)
    work, guests = again(batch), again(urgent)
    play.run([*work, *guests])
    seconds = max(r.ended for r in work) - min(r.sent for r in work)
    after = client.call("scheduler.stats", None, SchedulerStats)
    batch_tokens = sum(r.count for r in batch)
    urgent_tokens = sum(len(r.got) for r in guests if r.sent < max(w.ended for w in work))
    realtime = [r for r in guests if r.band == "realtime"]
    return {
        "idle": {band: first_token(idle, band) for band in ("realtime", "interactive")},
        "full": {band: first_token(guests, band) for band in ("realtime", "interactive")},
        "full_step_ms": round(1e3 * alone_seconds / (batch_tokens / model.slots), 2),
        "realtime_admitted": sum(not r.error for r in realtime),
        "realtime_refused": sum(r.error in ("ETIMEDOUT", "ENOMEM") and not r.times for r in realtime),
        "deadlines_missed": sum(r.error == "ETIMEDOUT" and bool(r.times) for r in realtime),
        "batch_alone_tokens_per_s": round(batch_tokens / alone_seconds, 1),
        "batch_beside_urgent_tokens_per_s": round(batch_tokens / seconds, 1),
        "all_tokens_beside_urgent_per_s": round((batch_tokens + urgent_tokens) / seconds, 1),
        "batch_loss_beyond_displaced": round(
            1 - (batch_tokens + urgent_tokens) / seconds / (batch_tokens / alone_seconds), 4
        ),
        "displaced": after.displaced - before.displaced,
        "batch_tasks": len(work),
        "batch_tasks_with_other_tokens": sum(a.got != b.got for a, b in zip(alone, work, strict=True)),
    }


def first_token(requests: list[Request], band: str) -> dict[str, float]:
    times = sorted(r.times[0] - r.sent for r in requests if r.band == band and r.times)
    at = [times[min(len(times) - 1, int(share * len(times)))] if times else 0.0 for share in (0.5, 0.99)]
    return {"p50_ms": round(1e3 * at[0], 2), "p99_ms": round(1e3 * at[1], 2), "count": len(times)}


def main() -> None:
    """Start the processes, measure, and report."""
    parser = arguments("Urgent requests on a system that is full of batch work.")
    parser.add_argument("--driver", choices=["null", "jax"], default="null")
    parser.add_argument("--model", type=Path, default=Path(), help="GGUF file, for the JAX driver")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each request")
    parser.add_argument("--count", type=int, default=128, help="tokens of a batch request")
    parser.add_argument("--batches", type=float, default=4.0, help="batch requests for each slot")
    parser.add_argument("--urgent", type=int, default=50)
    parser.add_argument("--urgent-count", type=int, default=8)
    parser.add_argument("--begin", type=float, default=1.0, help="seconds until the first urgent request")
    parser.add_argument("--every", type=float, default=0.09, help="seconds between them")
    parser.add_argument("--deadline", type=float, default=1.0, help="of realtime requests, in seconds")
    parser.add_argument("--pages", type=float, default=0.85, help="pages, as a share of what all slots need")
    options = parser.parse_args()
    row_us = (FULL_MS - STEP_MS) * 1e3 / options.slots
    null = {"step_ms": STEP_MS, "prefill_us": PREFILL_US, "decode_us": row_us}
    driver = DriverSpec(name=DRIVER, kind=options.driver, options=null if options.driver == "null" else {})
    each = -(-(options.prompt + options.count) // options.page_tokens)
    request = LoadRequest(
        model="m",
        source=str(options.model) if options.driver == "jax" else "",
        dtype=options.dtype,
        kv_dtype=options.dtype,
        page_tokens=options.page_tokens,
        pages=round(options.pages * options.slots * each),
        slots=options.slots,
        max_context=2 * (options.prompt + options.count),
        chunk_tokens=options.chunk_tokens,
    )
    with Cluster(driver) as cluster:
        model, _ = cluster.load(request)
        with cluster.connect("user") as client:
            figures = measure(Play(client, "m"), cluster.client, model, options)
    settings = {name: getattr(options, name) for name in ("driver", "slots", "prompt", "count", "pages")}
    Report("preemption", figures, environment={"options": settings}).write(options.json)


if __name__ == "__main__":
    main()

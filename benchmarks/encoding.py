"""Speed of encoders through the whole system: a ZeroMQ client, the kernel, the scheduler and the JAX driver.

    python -m benchmarks.encoding --model random:benchmarks/shapes/bert-large.json --dtype bfloat16 \
        --chunk-tokens 16384 [--length 128] [--texts 16384] [--json FILE]

``one``: a request of one text on an idle system. ``many``: all texts, in requests of 64. ``urgent``: a
request of one text while all texts are being encoded in the batch band. Token ids are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.cluster import DRIVER, Cluster
from benchmarks.play import say
from benchmarks.report import Report, arguments
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc import codec, header
from llmos.ipc.calls import FINAL, Answer
from llmos.ipc.client import Client
from llmos.ipc.grant import Band
from llmos.ipc.sockets import to_bytes
from llmos.services.manifest import DriverSpec
from llmos.services.scheduler.messages import Encode, SchedulerStats

TOGETHER = 64
SINGLES = 50


class Load:
    """Sends requests on one connection and waits for their ends."""

    def __init__(self, client: Client, model: LoadedModel, length: int) -> None:
        self._link = client._link
        self._model = model
        self._length = length
        self._rng = np.random.default_rng(1)
        self._open = 0

    def send(self, texts: int, band: Band = "interactive") -> None:
        tokens = self._rng.integers(0, self._model.vocab_size, (texts, self._length)).tolist()
        body = codec.encode(Encode(model=self._model.model, texts=tokens, band=band))
        self._link.call("scheduler.encode", body, 0, self._on_answer)
        self._open += 1

    def wait(self) -> None:
        """Until all requests have ended."""
        while self._open:
            self._link.socket.poll(1000)
            for message in self._link.wire.drain(4096):
                frames = to_bytes(message)
                self._link.deliver(header.decode(frames[0]), frames)

    def _on_answer(self, answer: Answer) -> None:
        if answer.error is not None:
            raise answer.error
        self._open -= answer.kind in FINAL


def one(load: Load) -> dict[str, float]:
    times = []
    for _ in range(SINGLES):
        begun = time.perf_counter()
        load.send(1)
        load.wait()
        times.append(time.perf_counter() - begun)
    return _milliseconds(times)


def many(load: Load, texts: int, length: int) -> dict[str, float]:
    begun = time.perf_counter()
    for _ in range(texts // TOGETHER):
        load.send(TOGETHER)
    load.wait()
    seconds = time.perf_counter() - begun
    return {
        "texts_per_s": round(texts / seconds, 1),
        "tokens_per_s": round(texts * length / seconds),
        "seconds": round(seconds, 3),
    }


def urgent(batch: Load, load: Load, texts: int) -> dict[str, float]:
    """The batch is on another connection, so that its answers do not stand before the urgent one's."""
    for _ in range(texts // TOGETHER):
        batch.send(TOGETHER, "batch")
    figures = one(load)
    batch.wait()
    return figures


def _milliseconds(times: list[float]) -> dict[str, float]:
    times = sorted(times[len(times) // 10 :])
    return {
        "p50_ms": round(statistics.median(times) * 1e3, 2),
        "p99_ms": round(times[int(len(times) * 0.99)] * 1e3, 2),
    }


def main() -> None:
    parser = arguments("Speed of encoders through the whole system.")
    parser.add_argument("--model", required=True, help="safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", type=Path, help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk-tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=16384)
    options = parser.parse_args()
    request = LoadRequest(
        model="bench",
        source=options.model,
        cache=str(options.cache or ""),
        dtype=options.dtype,
        chunk_tokens=options.chunk_tokens,
        max_context=max(options.length, 16),
    )
    report = Report("encoding")
    with Cluster(DriverSpec(name=DRIVER, kind="jax")) as cluster, cluster.connect("user") as second:
        loaded, seconds = cluster.load(request)
        report.figures["load"] = {"seconds": round(seconds, 1), **loaded.phases}
        say(f"load: {report.figures['load']}")
        load, batch = (Load(client, loaded, options.length) for client in (cluster.client, second))
        say(f"warmed up: {many(load, min(options.texts, 1024), options.length)}")
        cases: dict[str, Callable[[], dict[str, float]]] = {
            "one": lambda: one(load),
            "many": lambda: many(load, options.texts, options.length),
            "urgent": lambda: urgent(batch, load, options.texts),
        }
        for name, case in cases.items():
            report.figures[name] = case()
            say(f"{name}: {report.figures[name]}")
        (line,) = cluster.client.call("scheduler.stats", None, SchedulerStats).hosts
        report.figures["last_step_ms"] = round(line.step_micros / 1e3, 2)
        report.environment = {"model": options.model, "dtype": options.dtype, "length": options.length}
    report.write(options.json)


if __name__ == "__main__":
    main()

"""Serving speed of the whole system: a ZeroMQ client, the kernel, memory, the scheduler and the JAX driver.

    python -m benchmarks.serving --model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 \
        --page-tokens 64 --slots 256 --chunk-tokens 2048 [--only batch one ttft classify] [--json FILE] \
        [--mesh tensor=2] [--weights float8] [--kv-dtype float8] [--temperature 0.8 --top-p 0.95] \
        [--compare FILE]

``batch``: 256 requests of 512 tokens, 256 new ones each. ``queue``: 1,024 of them. ``one``: a single
stream of 512. ``ttft``: first token of 2,048, of prompts right after each other, which a GPU computes at the
clock that its power allows, and half a second apart. ``classify``: 512 requests of 512 tokens, one new one
each. No prompt shares a page with another, and every request produces all its tokens. With ``--mesh data=N``
there are N times as many requests. ``--compare`` takes the report of another run, on one device or in
bfloat16: the ratios are this run's rates over those, and its first token's time over this one's. On an
NVIDIA GPU ``device`` is what ``benchmarks.watch`` saw meanwhile.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.cluster import DRIVER, Cluster
from benchmarks.report import Report, arguments
from benchmarks.timing import first_tokens
from benchmarks.watch import Watch
from llmos.drivers.sdk.messages import DTYPES, PRECISIONS, LoadedModel, LoadRequest, Sampling
from llmos.ipc import codec, header
from llmos.ipc.calls import Answer
from llmos.ipc.client import Client
from llmos.ipc.grant import BANDS, Band
from llmos.ipc.header import Kind
from llmos.ipc.sockets import to_bytes
from llmos.services.manifest import DriverSpec
from llmos.services.scheduler.messages import Emitted, SchedulerStats, Submit

GREEDY = Sampling()
CASES = ("ttft", "one", "batch", "queue", "classify")


@dataclass
class Request:
    """One request in flight: when it was sent, and when its tokens came."""

    sent: float
    count: int
    times: list[float] = field(default_factory=list)
    ended: float = 0.0


class Load:
    """Sends requests on one connection and notes when their tokens arrive."""

    def __init__(self, client: Client, model: LoadedModel, band: Band, sampling: Sampling = GREEDY) -> None:
        self._band = band
        self._sampling = sampling
        self._client = client
        self._link = client._link
        self._model = model
        self._rng = np.random.default_rng(1)
        self._requests: dict[int, Request] = {}
        self._open = 0
        self._link.call("scheduler.attach", codec.EMPTY, 0, self._on_tokens)

    def run(self, requests: int, prompt: int, count: int) -> list[Request]:
        """Send ``requests`` at once and wait for all of them."""
        self._requests = {}
        for _ in range(requests):
            tokens = self._rng.integers(0, self._model.vocab_size, prompt).tolist()
            submit = Submit(
                model=self._model.model,
                tokens=tokens,
                max_tokens=count,
                sampling=self._sampling,
                band=self._band,
            )
            body = codec.encode(submit)
            sent = time.perf_counter()
            call = self._link.call("scheduler.submit", body, 0, self._on_end)
            self._requests[call] = Request(sent, count)
        self._open = requests
        while self._open:
            self._link.socket.poll(1000)
            for message in self._link.wire.drain(4096):
                frames = to_bytes(message)
                self._link.deliver(header.decode(frames[0]), frames)
        return list(self._requests.values())

    def _on_tokens(self, answer: Answer) -> None:
        if answer.error is not None:
            raise answer.error
        now = time.perf_counter()
        for tokens in codec.decode(answer.body, Emitted).tokens:
            self._requests[tokens.call].times += [now] * len(tokens.tokens)

    def _on_end(self, answer: Answer) -> None:
        if answer.error is not None:
            raise answer.error
        assert answer.kind == Kind.END
        self._open -= 1


def throughput(load: Load, requests: int, prompt: int, count: int) -> dict[str, Any]:
    begun = time.perf_counter()
    done = load.run(requests, prompt, count)
    seconds = time.perf_counter() - begun
    gaps = [b - a for r in done for a, b in zip(r.times, r.times[1:])]
    firsts = [r.times[0] - r.sent for r in done]
    return {
        "output_tokens_per_s": round(requests * count / seconds, 1),
        "requests_per_s": round(requests / seconds, 2),
        "seconds": round(seconds, 3),
        "first_token_p50_ms": round(statistics.median(firsts) * 1e3, 1),
        "gap_p50_ms": round(statistics.median(gaps) * 1e3, 2) if gaps else 0.0,
        "gap_p99_ms": round(sorted(gaps)[int(len(gaps) * 0.99)] * 1e3, 2) if gaps else 0.0,
    }


def one_stream(load: Load, prompt: int, count: int) -> dict[str, float]:
    rates = []
    for _ in range(3):
        (request,) = load.run(1, prompt, count)
        rates.append((count - 1) / (request.times[-1] - request.times[0]))
    return {"tokens_per_s": round(statistics.median(rates), 1)}


def first_token(once: Callable[[], float]) -> dict[str, float]:
    """Milliseconds, of prompts one right after the other and of some that come to a device that has rested;
    ``once`` gives the seconds of one."""
    took, rested = first_tokens(once, 7)
    return {"client_p50_ms": round(took * 1e3, 2), "rested_p50_ms": round(rested * 1e3, 2)}


def to_first(load: Load, prompt: int) -> float:
    """Seconds from sending a prompt to its first token."""
    (request,) = load.run(1, prompt, 1)
    return request.times[0] - request.sent


RATES = {
    "batch": "output_tokens_per_s",
    "queue": "output_tokens_per_s",
    "one": "tokens_per_s",
    "classify": "requests_per_s",
}


def compare(figures: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as in an earlier report, or as a peer, by case."""
    common = figures.keys() & before.keys()
    ratios = {case: figures[case][key] / before[case][key] for case, key in RATES.items() if case in common}
    if "ttft" in common:
        for name, key in (("ttft", "client_p50_ms"), ("ttft_rested", "rested_p50_ms")):
            ratios[name] = before["ttft"][key] / figures["ttft"][key]
    return {case: round(ratio, 3) for case, ratio in ratios.items()}


def axis(text: str) -> tuple[str, int]:
    """``name=size`` of a mesh."""
    name, _, size = text.partition("=")
    return name, int(size)


def run(load: Load, case: str, many: int) -> dict[str, Any]:
    """One case, whose batch has ``many`` requests."""
    if case == "ttft":
        return first_token(lambda: to_first(load, 2048))
    if case == "one":
        return one_stream(load, 32, 512)
    if case == "classify":
        return throughput(load, 2 * many, 512, 1)
    return throughput(load, many * (4 if case == "queue" else 1), 512, 256)


def measure(load: Load, cases: list[str], scale: float) -> dict[str, Any]:
    """Each case after a warm-up of its own shape."""
    many = max(1, round(256 * scale))
    figures: dict[str, Any] = {}
    load.run(min(many, 8), 512, 8)
    load.run(many, 64, 16)
    for case in cases:
        with Watch() as watch:
            figures[case] = run(load, case, many)
        if watch.figures:
            figures[case]["device"] = watch.figures
        print(case, figures[case], flush=True)
    return figures


def main() -> None:
    parser = arguments("Serving speed of the whole system.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", type=Path, help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", default="same", choices=PRECISIONS)
    parser.add_argument("--kv-dtype", choices=DTYPES, help="as --dtype, if left out")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="steps in a quantum")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests, for small machines")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--band", default="interactive", choices=BANDS)
    parser.add_argument(
        "--settle",
        type=float,
        default=0.0,
        help="seconds to leave the driver idle first, to rehearse",
    )
    parser.add_argument("--mesh", nargs="+", type=axis, default=[], metavar="AXIS=SIZE")
    parser.add_argument("--speculation", default="off", choices=["off", "ngram"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--compare", type=Path, help="report of a run on one device")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    driver = DriverSpec(name=DRIVER, kind="jax", options={"attention": options.attention})
    request = LoadRequest(
        model="bench",
        source=options.model,
        cache=str(options.cache or ""),
        dtype=options.dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype or options.dtype,
        slots=options.slots,
        page_tokens=options.page_tokens,
        chunk_tokens=options.chunk_tokens,
        max_context=options.max_context,
        mesh=dict(options.mesh),
        speculation=options.speculation,
    )
    report = Report("serving")
    with Cluster(driver, options.steps) as cluster:
        loaded, seconds = cluster.load(request)
        report.figures["load"] = {"seconds": round(seconds, 1), **loaded.phases}
        time.sleep(options.settle)
        scale = options.scale * loaded.replicas
        sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        load = Load(cluster.client, loaded, options.band, sampling)
        report.figures |= measure(load, options.only, scale)
        line = cluster.client.call("scheduler.stats", None, SchedulerStats).hosts[0]
        report.figures["last_step_ms"] = round(line.step_micros / 1e3, 2)
        report.environment = {"model": options.model, "dtype": options.dtype, "attention": loaded.attention}
        report.environment |= {"weights": options.weights, "kv_dtype": options.kv_dtype or options.dtype}
        report.environment["mesh"] = dict(options.mesh)
        report.environment["sampling"] = msgspec.to_builtins(sampling)
    if options.compare:
        report.ratios = compare(report.figures, json.loads(options.compare.read_text())["figures"])
    report.write(options.json)


if __name__ == "__main__":
    main()

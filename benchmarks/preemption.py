"""Urgent requests on a system that is full of batch work, against the same requests on an idle one.

    python -m benchmarks.preemption [--driver null|jax --model MODEL] [--only first_token deadlines] \
        [--cache FOLDER] [--json FILE]

The real kernel, memory, scheduler and driver process. MODEL is a GGUF file, or ``random:`` and a shape of
``benchmarks/shapes``: ``llama-3.1-8b.json`` on a GPU, ``tiny.json`` anywhere.

``first_token``: batch work takes every slot and needs more pages than there are; realtime requests (with
deadlines) and interactive ones come at fixed times. Reported: time to first token by band, the deadlines
kept, how much longer the batch took beyond the steps that the urgent work itself needs, and how many batch
tasks produced other tokens than undisturbed. Where bfloat16 rounds, tokens depend on what else is in a step,
disturbed or not: beside it is how many differ between two undisturbed runs.
``deadlines``: see ``benchmarks.deadlines``.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from benchmarks import deadlines
from benchmarks.cluster import DRIVER, Cluster
from benchmarks.play import Play, Request, say
from benchmarks.report import Report, arguments
from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc.client import Client
from llmos.services.manifest import DriverSpec
from llmos.services.scheduler.messages import SchedulerStats

# An 8B model on an H200 takes 4.6 ms a step, 13.4 with a full batch, and 21 us for a prompt token.
STEP_MS, FULL_MS, PREFILL_US = 4.6, 13.4, 21.0


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
    play.run(again(urgent))
    say("first token: batch work, once to warm up")
    warm = again(batch)
    play.run(warm)  # fills the prefix cache alike for what is measured
    say("first token: urgent requests alone")
    idle = again(urgent)
    play.run(idle)
    say("first token: batch work alone")
    alone = again(batch)
    alone_seconds = play.run(alone)
    say("first token: both")
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
        "realtime_admitted": sum(not r.refused for r in realtime),
        "realtime_refused": sum(r.refused for r in realtime),
        "deadlines_missed": sum(r.missed for r in realtime),
        "batch_alone_tokens_per_s": round(batch_tokens / alone_seconds, 1),
        "batch_beside_urgent_tokens_per_s": round(batch_tokens / seconds, 1),
        "all_tokens_beside_urgent_per_s": round((batch_tokens + urgent_tokens) / seconds, 1),
        "batch_loss_beyond_displaced": round(
            1 - (batch_tokens + urgent_tokens) / seconds / (batch_tokens / alone_seconds), 4
        ),
        "displaced": after.displaced - before.displaced,
        "batch_tasks": len(work),
        "batch_tasks_with_other_tokens": differing(alone, work),
        "with_other_tokens_undisturbed": differing(warm, alone),
    }


def differing(some: list[Request], others: list[Request]) -> int:
    """How many requests got other tokens the second time."""
    return sum(one.got != other.got for one, other in zip(some, others, strict=True))


def first_token(requests: list[Request], band: str) -> dict[str, float]:
    times = sorted(r.times[0] - r.sent for r in requests if r.band == band and r.times)
    at = [times[min(len(times) - 1, int(share * len(times)))] if times else 0.0 for share in (0.5, 0.99)]
    return {"p50_ms": round(1e3 * at[0], 2), "p99_ms": round(1e3 * at[1], 2), "count": len(times)}


EXPERIMENTS = {"first_token": measure, "deadlines": deadlines.measure}


def main() -> None:
    """Start the processes, measure, and report."""
    parser = arguments("Urgent requests on a system that is full of batch work.")
    parser.add_argument("--driver", choices=["null", "jax"], default="null")
    parser.add_argument("--model", default="", help="for the JAX driver: GGUF file, or random:CONFIG_JSON")
    parser.add_argument("--only", nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--cache", type=Path, help="folder for converted weights and compiled programs")
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
    parser.add_argument("--host-pages", type=int, default=0, help="pages in RAM that tasks can be moved to")
    parser.add_argument(
        "--settle", type=float, default=0.0, help="seconds left for what compiles after loading"
    )
    parser.add_argument("--kink", type=int, default=0, help="of the null driver: tokens that take no time")
    deadlines.add_options(parser)
    options = parser.parse_args()
    if options.driver == "jax" and not options.model:
        parser.error("the JAX driver needs --model, such as random:benchmarks/shapes/tiny.json")
    row_us = (FULL_MS - STEP_MS) * 1e3 / options.slots
    null = {"step_ms": STEP_MS, "prefill_us": PREFILL_US, "decode_us": row_us, "kink": options.kink}
    driver = DriverSpec(name=DRIVER, kind=options.driver, options=null if options.driver == "null" else {})
    each = -(-(options.prompt + options.count) // options.page_tokens)
    request = LoadRequest(
        model="m",
        source=options.model if options.driver == "jax" else "",
        cache=str(options.cache or ""),
        dtype=options.dtype,
        kv_dtype=options.dtype,
        page_tokens=options.page_tokens,
        pages=round(options.pages * options.slots * each),
        slots=options.slots,
        max_context=2 * (options.prompt + options.count),
        chunk_tokens=options.chunk_tokens,
        host_pages=options.host_pages,
    )
    with Cluster(driver) as cluster:
        model, seconds = cluster.load(request)
        figures: dict[str, Any] = {"load_s": round(seconds, 1)}
        time.sleep(options.settle)
        with cluster.connect("user") as client:
            play = Play(client, "m")
            # Whatever the shape, a few short requests first: nothing is timed on a cold driver.
            play.run([Request("batch", list(range(1, 100 + i)), 8) for i in range(min(8, model.slots))])
            for name in options.only:
                figures[name] = EXPERIMENTS[name](play, cluster.client, model, options)
    names = ("driver", "model", "dtype", "slots", "prompt", "count", "pages", "host_pages", "settle")
    settings = {name: getattr(options, name) for name in names}
    Report("preemption", figures, environment={"options": settings}).write(options.json)


if __name__ == "__main__":
    main()

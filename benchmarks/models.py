"""Several models on one device, most requests for one of them: a part of the KV memory each, or one for all.

    python -m benchmarks.models [--driver null|jax] [--models 8] [--arena BYTES] [--json FILE]

The real kernel, memory, scheduler and driver process. All requests are sent at once; reported are the tokens
a second until all are answered, with ``arena`` "own" (each model an equal part) and "shared", in
turns. The models are of the null driver, with the step times of a small model on a GPU, or Llama shapes of
random weights for the JAX driver. Every answer is the same both ways, or the program ends with an error.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.cluster import DRIVER, Cluster
from benchmarks.play import Play, Request
from benchmarks.report import Report, arguments
from llmos.drivers.null.pages import page_size
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.grant import Band
from llmos.services.manifest import DriverSpec
from llmos.services.memory.messages import Usage
from llmos.services.scheduler.messages import SchedulerStats

NULL: dict[str, Any] = {"step_ms": 4.0, "prefill_us": 5.0, "decode_us": 30.0}
# Layers, KV heads and page tokens of each model: their pages differ in size.
SHAPES = [(4, 2, 16), (2, 2, 16), (3, 1, 16), (2, 1, 32), (4, 1, 16), (3, 2, 16), (2, 2, 32), (3, 1, 32)]
HEAD, HEADS, VOCABULARY = 32, 4, 256


@dataclass
class Asked(Request):
    """A request to one of the models."""

    model: str = ""


class PlayAll(Play):
    """Plays requests to several models on one connection."""

    def send(self, request: Request) -> None:
        assert isinstance(request, Asked)
        self._model = request.model
        super().send(request)


def requests(options: Any) -> list[LoadRequest]:
    """The models, without what each run says of their memory."""
    made = []
    for number in range(options.models):
        layers, kv_heads, page_tokens = SHAPES[number % len(SHAPES)]
        source = _shape(options.folder, number, layers, kv_heads) if options.driver == "jax" else ""
        made.append(
            LoadRequest(
                model=f"m{number}",
                source=source,
                page_tokens=page_tokens,
                slots=options.slots,
                max_context=2 * (options.prompt + options.count),
                chunk_tokens=256,
            )
        )
    return made


def page_bytes(request: LoadRequest, number: int, driver: str) -> int:
    """Bytes of a page of a model."""
    if driver == "null":
        return page_size(request.page_tokens)
    layers, kv_heads, page_tokens = SHAPES[number % len(SHAPES)]
    return 2 * layers * kv_heads * HEAD * page_tokens * 4


def _shape(folder: Path, number: int, layers: int, kv_heads: int) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HEADS * HEAD,
        "intermediate_size": 2 * HEADS * HEAD, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads, "head_dim": HEAD, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    path = folder / f"m{number}.json"
    path.write_text(json.dumps(config))
    return f"random:{path}"


def traffic(options: Any) -> list[Asked]:
    """Zipf over the models, all at once; interactive and batch."""
    rng = random.Random(9)
    weights = [1.0 / (rank + 1) ** options.skew for rank in range(options.models)]
    bands: tuple[Band, ...] = ("interactive", "batch")
    made = []
    for number in range(options.requests):
        (model,) = rng.choices(range(options.models), weights)
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(options.prompt // 2, options.prompt))]
        made.append(Asked(bands[number % 2], prompt, options.count, model=f"m{model}"))
    return made


def measure(options: Any, shared: bool) -> tuple[dict[str, Any], list[list[int]]]:
    """Boot, load, answer all requests; figures, and the tokens of each answer."""
    driver = DriverSpec(name=DRIVER, kind=options.driver, options=NULL if options.driver == "null" else {})
    with Cluster(driver) as cluster:
        for number, request in enumerate(requests(options)):
            cluster.load(_placed(request, number, options, shared))
        with cluster.connect("user") as client:
            play = PlayAll(client, "")
            play.run([Asked("batch", list(range(1, 20)), 2, model=f"m{i}") for i in range(options.models)])
            if options.driver == "jax":
                play.run(traffic(options))  # compiles
            asked = traffic(options)
            before = cluster.client.call("scheduler.stats", None, SchedulerStats)
            seconds = play.run(asked)
            after = cluster.client.call("scheduler.stats", None, SchedulerStats)
            usage = cluster.client.call("memory.usage", None, Usage)
    failed = [request.error for request in asked if request.error]
    if failed:
        sys.exit(f"{len(failed)} requests failed: {sorted(set(failed))}")
    if any(arena.owned for arena in usage.arenas):
        sys.exit("pages are owned by nobody's tasks")
    firsts = sorted(request.times[0] - request.sent for request in asked)
    figures = {
        "tokens_per_s": round(sum(len(request.got) for request in asked) / seconds, 1),
        "first_token_p50_s": round(statistics.median(firsts), 3),
        "first_token_worst_s": round(firsts[-1], 3),
        "displaced": after.displaced - before.displaced,
        "bytes": sum(pool.slabs * pool.slab_bytes for pool in usage.pools)
        or sum(arena.total * arena.page_bytes for arena in usage.arenas),
    }
    return figures, [request.got for request in asked]


def _placed(request: LoadRequest, number: int, options: Any, shared: bool) -> LoadRequest:
    if shared:
        return msgspec.structs.replace(request, arena="shared", arena_bytes=options.arena)
    pages = options.arena // options.models // page_bytes(request, number, options.driver)
    return msgspec.structs.replace(request, pages=pages)


def main() -> None:
    """Both ways in turns, and the ratio of each pair."""
    parser = arguments("Several models on one device: a part of the memory each, or one for all.")
    parser.add_argument("--driver", choices=["null", "jax"], default="null")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32, help="of each model")
    parser.add_argument("--arena", type=int, default=0, help="bytes of KV memory in all")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens at most")
    parser.add_argument("--count", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--skew", type=float, default=1.2, help="exponent of Zipf's law")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmos-b") as folder:
        options.folder = Path(folder)
        if not options.arena:
            # Five of the largest requests for each model.
            each = requests(options)
            options.arena = max(
                5 * options.models * page_bytes(r, i, options.driver)
                * -(-(options.prompt + options.count) // r.page_tokens)
                for i, r in enumerate(each)
            )  # fmt: skip
        rows: dict[str, list[dict[str, Any]]] = {"static": [], "shared": []}
        answers: list[list[int]] | None = None
        for _ in range(options.rounds):
            for name, found in rows.items():
                figures, got = measure(options, name == "shared")
                print(name, figures, file=sys.stderr, flush=True)
                found.append(figures)
                if answers is not None and got != answers:
                    sys.exit(f"{name}: other tokens than before")
                answers = got
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(*rows.values(), strict=True)]
    report = Report("models", rows)
    report.ratios = {"shared_over_static": round(statistics.median(ratios), 3)}
    names = ("driver", "models", "slots", "arena", "requests", "prompt", "count", "skew")
    report.environment = {"options": {name: getattr(options, name) for name in names}}
    report.write(options.json)


if __name__ == "__main__":
    main()

"""First token of a prompt whose beginning is in the prefix cache, against one that nobody has sent before.

    python -m benchmarks.prefix --model MODEL.gguf [--shared 2000] [--own 16] [--json FILE]

The real kernel, memory, scheduler and JAX driver. Misses and hits come in turns: every miss has a beginning
of its own, every hit repeats the beginning of the miss before it and ends differently.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path

from benchmarks.cluster import DRIVER, Cluster
from benchmarks.play import Play, Request
from benchmarks.report import Report, arguments
from llmos.drivers.sdk.messages import LoadRequest
from llmos.services.manifest import DriverSpec


def first_token(play: Play, tokens: list[int]) -> float:
    """Seconds to the first token of a lone request."""
    request = Request("interactive", tokens, 1)
    play.run([request])
    return request.times[0] - request.sent


def main() -> None:
    """Start the processes, measure, and report."""
    parser = arguments("First token with and without a cached prefix.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or safetensors folder")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--shared", type=int, default=2000, help="tokens that a hit shares with a miss")
    parser.add_argument("--own", type=int, default=16, help="tokens after them")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    request = LoadRequest(
        model="m",
        source=str(options.model),
        cache=options.cache,
        slots=4,
        max_context=options.shared + 2 * options.own,
        chunk_tokens=512,
    )
    rng = random.Random(3)
    misses, hits = [], []
    with Cluster(DriverSpec(name=DRIVER, kind="jax")) as cluster:
        model, _ = cluster.load(request)
        play = Play(cluster.client, "m")
        for turn in range(options.rounds + 1):
            beginning, *ends = (
                [rng.randrange(model.vocab_size) for _ in range(n)]
                for n in (options.shared, options.own, options.own)
            )
            miss, hit = (first_token(play, beginning + end) for end in ends)
            if turn:  # the first compiles
                misses.append(miss)
                hits.append(hit)
    medians = {name: statistics.median(found) for name, found in (("miss", misses), ("hit", hits))}
    report = Report("prefix", {f"{name}_ms": round(1e3 * value, 1) for name, value in medians.items()})
    report.ratios["hit_of_miss"] = round(medians["hit"] / medians["miss"], 4)
    report.environment = {"model": str(options.model), "shared": options.shared, "own": options.own}
    report.write(options.json)


if __name__ == "__main__":
    main()

"""What it costs a model to have its pages in a pool that others share: the same work both ways, by turns.

    python -m benchmarks.arena --model MODEL.gguf [--dtype float32] [--batch 1 8] [--json FILE]
    python -m benchmarks.arena --model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 \
        --page-tokens 64 --chunk-tokens 2048 --prompt 2048 --batch 1 8 64 256 --arena-gib 48 --repeats 9

The model is loaded twice, with pages of its own and with pages at the far end of a pool, where offsets are
largest. Whatever is measured is run on one and the other by turns; a ratio is the median over the turns. The
tokens of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.engine import Session
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Arena, Chunk, LoadRequest, Start

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STEPS = 32
WARM_STEPS = 8


class Side(Session):
    """The model one of the two ways; ``tokens`` are those of the last run."""

    tokens: list[list[int]]
    clock: str = "wall"

    def seconds(self, steps: int, **fields: Any) -> float:
        """Run one quantum, keep its tokens, and say how long it took."""
        begun = CLOCKS[self.clock]()
        done, _ = self.run(steps, **fields)
        self.tokens = [step.tokens for step in done]
        return CLOCKS[self.clock]() - begun

    def admit(self, slots: int, prompt: int, total: int) -> tuple[list[Start], list[Chunk]]:
        """As ``Session.admit``, with the last pages there are."""
        starts, chunks = super().admit(slots, prompt, total)
        last = self.loaded.pages - 1
        for start in starts:
            start.pages[:] = [last - page for page in start.pages]
        return starts, chunks


def prefill(sides: list[Side], prompt: int, repeats: int) -> list[list[float]]:
    """Seconds of one prompt, by repeat and side."""
    found = []
    for _ in range(repeats + 1):
        row = []
        for side in sides:
            starts, chunks = side.admit(1, prompt, prompt + 1)
            row.append(side.seconds(len(chunks), start=starts, chunks=chunks))
            side.run(1, release=[0])
        found.append(row)
    return found[1:]


def decode(sides: list[Side], batch: int, context: int, repeats: int) -> list[list[float]]:
    """Seconds of ``STEPS`` steps of a full batch, by repeat and side; raises if tokens differ."""
    slots = list(range(batch))
    for side in sides:
        starts, chunks = side.admit(batch, context, context + WARM_STEPS + STEPS * repeats + 1)
        side.run(len(chunks), start=starts, chunks=chunks)
        side.run(WARM_STEPS, decode=slots)
    found = []
    for turn in range(repeats):
        row = {side.loaded.model: side.seconds(STEPS, decode=slots) for side in sides[:: 1 - 2 * (turn % 2)]}
        found.append([row[side.loaded.model] for side in sides])
        if sides[0].tokens != sides[1].tokens:
            raise SystemExit(f"batch {batch}: the tokens differ in turn {turn}")
    for side in sides:
        side.run(1, release=slots)
    return found


def summary(seconds: list[list[float]], tokens: int) -> dict[str, float]:
    """Tokens per second of both sides, and the median of what the pool takes times as long."""
    own, shared = (round(tokens / statistics.median(column), 1) for column in zip(*seconds, strict=True))
    ratio = statistics.median(row[1] / row[0] for row in seconds)
    return {"own_tokens_per_s": own, "shared_tokens_per_s": shared, "time_shared_over_own": round(ratio, 4)}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost of a shared arena.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--arena-gib", type=float, default=0.5)
    parser.add_argument("--attention", default="auto", choices=["auto", "native", "xla", "pallas"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: for a busy CPU")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load(driver: JaxDriver, chosen: argparse.Namespace, arena: Arena) -> Side:
    """The model with one kind of arena."""
    slots = max(chosen.batch)
    total = max(chosen.prompt, chosen.context + WARM_STEPS + STEPS * chosen.repeats) + 16
    request = LoadRequest(
        model=arena,
        source=chosen.model,
        cache=chosen.cache,
        dtype=chosen.dtype,
        kv_dtype=chosen.dtype,
        pages=slots * -(-total // chosen.page_tokens),
        page_tokens=chosen.page_tokens,
        chunk_tokens=chosen.chunk_tokens,
        slots=slots,
        max_context=total,
        arena=arena,
        arena_bytes=int(chosen.arena_gib * 2**30) if arena == "shared" else 0,
    )
    loaded = driver.load(request, lambda _: None)
    side = Side(driver, loaded)
    side.settle()
    return side


def main() -> None:
    """Measure and print, or write as JSON."""
    chosen = options()
    driver = JaxDriver(attention=chosen.attention)
    arenas: tuple[Arena, Arena] = "own", "shared"
    sides = [load(driver, chosen, arena) for arena in arenas]
    Side.clock = chosen.clock
    while driver.idle():
        pass
    figures = {"prefill": summary(prefill(sides, chosen.prompt, chosen.repeats), chosen.prompt)}
    for batch in chosen.batch:
        found = decode(sides, batch, chosen.context, chosen.repeats)
        figures[f"decode_{batch}"] = summary(found, batch * STEPS)
    loaded = sides[1].loaded
    report = {
        "name": "arena",
        "figures": figures,
        "environment": {
            "device": driver.describe().devices[0].name,
            "cores": len(os.sched_getaffinity(0)),
            "jax": metadata.version("jax"),
            "dtype": chosen.dtype,
            "clock": chosen.clock,
            "attention": loaded.attention,
            "slabs": loaded.slabs,
            "slab_bytes": loaded.slab_bytes,
            "slab_waste": round(1 - loaded.slab_pages * loaded.page_bytes / loaded.slab_bytes, 4),
        },
    }
    text = json.dumps(report, indent=2)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Speed of the JAX driver's engine alone: decode at several batch sizes, and prefill; no other process.

    python -m benchmarks.engine --model MODEL.gguf [--dtype float32] [--weights int8] [--kv-dtype int8] \
        [--temperature 0.8 [--top-p 0.95]] [--json FILE]

Decode is measured in quanta with two steps pending, as the SDK runs them, after a prompt of ``--context``
tokens; prefill is the time of one prompt of ``--prompt`` tokens to its first token, prompts right after each
other and, rested, half a second apart. A step's floor is the time to read the weights and the batch's pages
once, at the bandwidth of a plain copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

from benchmarks.timing import first_tokens
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import (
    DTYPES,
    PRECISIONS,
    Chunk,
    LoadedModel,
    LoadRequest,
    Quantum,
    Sampling,
    Start,
    Step,
)

DECODE_STEPS = 48
WARM_STEPS = 8
GREEDY = Sampling()


class Session:
    """One loaded model and the quanta run on it."""

    def __init__(self, driver: JaxDriver, loaded: LoadedModel, sampling: Sampling = GREEDY) -> None:
        self.driver, self.loaded, self.sampling, self.quanta = driver, loaded, sampling, 0

    def settle(self) -> None:
        """Compile what would else be compiled while steps are timed."""
        for engine in self.driver._engines[self.loaded.model]:
            for key in engine.programs.ahead():
                engine.programs.get(key)

    def run(self, steps: int, **fields: Any) -> tuple[list[Step], float]:
        """Execute one quantum; its steps and the seconds it took."""
        self.quanta += 1
        begun = time.perf_counter()
        pending: list[Callable[[], Step]] = []
        done: list[Step] = []
        for step in self.driver.execute(
            Quantum(id=self.quanta, model=self.loaded.model, steps=steps, **fields)
        ):
            pending.append(step)
            if len(pending) == 2:
                done.append(pending.pop(0)())
        done += [step() for step in pending]
        return done, time.perf_counter() - begun

    def admit(self, slots: int, prompt: int, total: int) -> tuple[list[Start], list[Chunk]]:
        """Starts and chunks for ``slots`` prompts of ``prompt`` tokens that may grow to ``total``."""
        each = -(-total // self.loaded.page_tokens)
        starts, chunks, step = [], [], 0
        for slot in range(slots):
            tokens = [3 + (7 * i + 11 * slot) % (self.loaded.vocab_size - 3) for i in range(prompt)]
            pages = list(range(slot * each, (slot + 1) * each))
            asked = msgspec.structs.replace(self.sampling, seed=slot)
            starts.append(
                Start(slot=slot, tokens=tokens, prompt=prompt, pages=pages, limit=total, sampling=asked)
            )
            for at in range(0, prompt, self.loaded.chunk_tokens):
                chunks.append(Chunk(step, slot, at, min(self.loaded.chunk_tokens, prompt - at)))
                step += 1
        return starts, chunks


def measure_decode(session: Session, batch: int, context: int, repeats: int) -> float:
    """Median output tokens per second of a full batch."""
    total = context + WARM_STEPS + DECODE_STEPS * repeats + 1
    starts, chunks = session.admit(batch, context, total)
    slots = list(range(batch))
    session.run(len(chunks), start=starts, chunks=chunks)
    session.run(WARM_STEPS, decode=slots)
    times = [session.run(DECODE_STEPS, decode=slots)[1] for _ in range(repeats)]
    session.run(1, release=slots)
    return batch * DECODE_STEPS / statistics.median(times)


def bandwidth(cells: int) -> float:
    """Bytes read and written in a second by a plain copy of ``cells`` float32 numbers, the best of three."""
    x = jnp.zeros(cells, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        results = [copy(x) for _ in range(4)]
        results[-1].block_until_ready()
        times.append((time.perf_counter() - begun) / len(results))
    return 2 * x.nbytes / min(times)


def floor(loaded: LoadedModel, batch: int, held: float, rate: float) -> float:
    """Seconds of the shortest decode step of rows of ``held`` tokens at a bandwidth of ``rate``."""
    return (loaded.weight_bytes + batch * held / loaded.page_tokens * loaded.page_bytes) / rate


def prefill(session: Session, prompt: int) -> float:
    """Seconds from one prompt to its first token."""
    starts, chunks = session.admit(1, prompt, prompt + 1)
    took = session.run(len(chunks), start=starts, chunks=chunks)[1]
    session.run(1, release=[0])
    return took


def main() -> None:
    """Measure and print, or write as JSON."""
    parser = argparse.ArgumentParser(description="Speed of the JAX driver's engine alone.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", default="same", choices=PRECISIONS)
    parser.add_argument("--kv-dtype", choices=DTYPES, help="as --dtype, if left out")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "pallas"])
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    driver = JaxDriver(attention=options.attention)
    rate = bandwidth(1 << (28 if driver.describe().devices[0].kind == "gpu" else 25))
    slots = max(options.batch)
    total = max(options.prompt, options.context + WARM_STEPS + DECODE_STEPS * options.repeats) + 16
    request = LoadRequest(
        model="bench",
        source=options.model,
        cache=options.cache,
        dtype=options.dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype or options.dtype,
        pages=slots * -(-total // options.page_tokens),
        page_tokens=options.page_tokens,
        chunk_tokens=options.chunk_tokens,
        slots=slots,
        max_context=total,
    )
    begun = time.perf_counter()
    loaded = driver.load(request, lambda _: None)
    session = Session(driver, loaded, Sampling(temperature=options.temperature, top_p=options.top_p))
    figures = {"load_s": round(time.perf_counter() - begun, 2)}
    session.settle()
    took, rested = first_tokens(lambda: prefill(session, options.prompt), options.repeats)
    figures["prefill_tokens_per_s"] = round(options.prompt / took, 1)
    figures["first_token_ms"] = round(took * 1e3, 2)
    figures["first_token_rested_ms"] = round(rested * 1e3, 2)
    ratios: dict[str, float] = {}
    for batch in options.batch:
        speed = measure_decode(session, batch, options.context, options.repeats)
        figures[f"decode_{batch}_tokens_per_s"] = round(speed, 1)
        held = options.context + WARM_STEPS + DECODE_STEPS * options.repeats / 2
        least = floor(loaded, batch, held, rate)
        ratios[f"decode_{batch}_step_over_floor"] = round(batch / speed / least, 2)
    report = {
        "name": "engine",
        "figures": figures,
        "peers": {},
        "ratios": ratios,
        "environment": {
            "device": driver.describe().devices[0].name,
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "jax": metadata.version("jax"),
            "dtype": options.dtype,
            "weights": options.weights,
            "kv_dtype": options.kv_dtype or options.dtype,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "weight_bytes": loaded.weight_bytes,
            "page_bytes": loaded.page_bytes,
            "copy_gb_per_s": round(rate / 1e9),
            "attention": loaded.attention,
            "load_phases": loaded.phases,
        },
    }
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

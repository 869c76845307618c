"""Where the time of a decode step goes on a GPU: its kernels by name, and the gaps between them.

    python -m benchmarks.step --model random:benchmarks/shapes/smollm2-135m.json [--batch 256] \
        [--context 512] [--apart] [--json FILE]

Steps run in quanta with two pending, as in ``benchmarks.engine``: first timed, then ``TRACED`` of them under
the profiler. Kernels that XLA numbers are counted as one. A gap is when none runs, between the first and the
last; the floor is the time to read weights and pages once at the bandwidth of a plain copy. ``--apart``
turns, writes and attends in kernels of their own, to compare.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax

from benchmarks.engine import Session, bandwidth, floor
from benchmarks.report import Report, arguments
from llmos.drivers.jax.attention.backend import Paged
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import DTYPES, PRECISIONS, LoadedModel, LoadRequest

PAGE = 64
WARM, TIMED, ROUNDS, TRACED = 16, 48, 3, 16


class Event(NamedTuple):
    """One run of a kernel, in nanoseconds."""

    name: str
    start: float
    duration: float


def main() -> None:
    """Measure, and print the kernels that take longest first."""
    options = parse()
    apart = patch.object(PallasAttention, "step", Paged.step) if options.apart else nullcontext()
    with apart:
        report = measure(options)
    report.write(options.json)


def parse() -> argparse.Namespace:
    parser = arguments("Kernels of a decode step on a GPU, and the gaps between them.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", default="same", choices=PRECISIONS)
    parser.add_argument("--kv-dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--apart", action="store_true", help="turn, write and attend in kernels of their own")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Report:
    """The figures of one model, of which each is printed as soon as it is known."""
    begun = time.perf_counter()
    driver = JaxDriver()
    loaded = load(driver, options)
    say(f"loaded in {time.perf_counter() - begun:.1f} s, attention {loaded.attention}")
    device = driver.describe().devices[0]
    rate = bandwidth(1 << (28 if device.kind == "gpu" else 22))
    least = floor(loaded, options.batch, options.context + WARM + TIMED * ROUNDS / 2, rate)
    session = Session(driver, loaded)
    session.settle()
    slots = list(range(options.batch))
    starts, chunks = session.admit(options.batch, options.context, total(options.context))
    session.run(len(chunks), start=starts, chunks=chunks)
    session.run(WARM, decode=slots)
    took = statistics.median(session.run(TIMED, decode=slots)[1] for _ in range(ROUNDS)) / TIMED
    say(f"step {took * 1e6:.0f} us, floor {least * 1e6:.0f} us at {rate / 1e12:.2f} TB/s")
    figures = {"step_us": round(took * 1e6), "floor_us": round(least * 1e6)}
    found = traced(session, slots)
    if found:
        kept, lines = summary(found, TRACED)
        say("\n".join(lines))
        figures |= kept
    else:
        say("the trace has no kernels of a GPU")
    environment = {"device": device.name, "batch": options.batch, "context": options.context}
    return Report(
        "step", figures, ratios={"step_over_floor": round(took / least, 2)}, environment=environment
    )


def load(driver: JaxDriver, options: argparse.Namespace) -> LoadedModel:
    each = -(-total(options.context) // PAGE)
    request = LoadRequest(
        model="step",
        source=options.model,
        cache=options.cache,
        dtype=options.dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype,
        page_tokens=PAGE,
        pages=options.batch * each,
        slots=options.batch,
        max_context=each * PAGE,
        chunk_tokens=512,
    )
    return driver.load(request, lambda _: None)


def total(context: int) -> int:
    """Tokens that a row comes to have."""
    return context + WARM + TIMED * ROUNDS + TRACED + 1


def traced(session: Session, slots: list[int]) -> list[Event]:
    """What ran on the first GPU in ``TRACED`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            session.run(TRACED, decode=slots)
        files = list(Path(folder).rglob("*.xplane.pb"))
        return [event for file in files for event in events(file)]


def events(file: Path) -> list[Event]:
    planes: Any = jax.profiler.ProfileData.from_file(str(file)).planes
    return [
        Event(event.name, event.start_ns, event.duration_ns)
        for plane in planes
        if plane.name == "/device:GPU:0"
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def summary(found: list[Event], steps: int) -> tuple[dict[str, int], list[str]]:
    """Figures of a step in microseconds, and a line for each kind of kernel."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for event in found:
        kinds[kind(event.name)].append(event.duration)
    lines = ["us a step  a step  us each  kernel"]
    for name, times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        each = sum(times) / len(times) / 1e3
        lines.append(f"{sum(times) / steps / 1e3:9.1f}  {len(times) / steps:6.1f}  {each:7.2f}  {name}")
    running = busy((event.start, event.start + event.duration) for event in found)
    span = max(event.start + event.duration for event in found) - min(event.start for event in found)
    figures = {
        "traced_step_us": round(span / steps / 1e3),
        "kernels_us": round(running / steps / 1e3),
        "gaps_us": round((span - running) / steps / 1e3),
        "kernels": round(len(found) / steps),
    }
    lines.append(", ".join(f"{name} {value}" for name, value in figures.items()))
    return figures, lines


def kind(name: str) -> str:
    """A kernel's name without the numbers that XLA appends, and what a template adds."""
    return re.sub(r"([_.]\d+)+$", "", name.split("<")[0])[:70]


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans, (start, end), lasts."""
    running, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        running += max(0.0, end - max(start, until))
        until = max(until, end)
    return running


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

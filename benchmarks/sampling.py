"""What choosing the tokens of a step takes, by variant, with our kernels and without them.

    python -m benchmarks.sampling [--rows 1 64 256] [--vocab 128256] [--json FILE]

Microseconds a step, medians by turns; the rest of the step's work on the host is part of it. On a CPU the
other way is XLA's; on a GPU, top-k and top-p by bisection. The logits are random normal numbers times 3; rows
ask for temperature 0.8, and a top-k of 50, a top-p of 0.95, or both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import jax
import jax.numpy as jnp

from benchmarks.report import Report, arguments
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.sampling import sampling, truncation
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.sdk.messages import Sampling
from llmos.ipc import paths

STEPS, TURNS = 20, 7
CASES = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8),
    "top_k": Sampling(temperature=0.8, top_k=50),
    "top_p": Sampling(temperature=0.8, top_p=0.95),
    "both": Sampling(temperature=0.8, top_k=50, top_p=0.95),
}

Program = Callable[[jax.Array, jax.Array, Any], Any]


def main() -> None:
    parser = arguments("Choosing tokens on a device.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--vocab", type=int, default=128256)
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not kernels.enable(paths.cache_dir() / "native"):
        print(f"no native kernels: {kernels.state()}")
    report = Report("sampling", environment={"device": device.device_kind, "vocab": options.vocab})
    for rows in options.rows:
        logits = 3 * jax.random.normal(jax.random.key(rows), (rows, options.vocab), jnp.float32)
        for name, asked in CASES.items():
            report.figures[f"{name}_{rows}"] = measure(logits, asked, device.platform)
            print(rows, name, report.figures[f"{name}_{rows}"], flush=True)
    report.write(options.json)


def measure(logits: jax.Array, asked: Sampling, platform: str) -> dict[str, int]:
    """Microseconds by way; where no kernel of ours is used there is one."""
    ways = {"us": compiled(logits, asked)}
    variant = sampling.variant_of(asked)
    if platform == "gpu" and variant == "filtered":
        with patch.object(truncation, "on_gpu", truncation.everywhere):
            ways["bisection_us"] = compiled(logits, asked)
    if platform == "cpu" and variant != "greedy" and kernels.state() == "ready":
        ways["xla_us"] = compiled(logits, asked, native=False)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, program in ways.items():
            times[way].append(timed(program, logits, asked))
    return {way: round(statistics.median(each) * 1e6) for way, each in times.items()}


def compiled(logits: jax.Array, asked: Sampling, native: bool = True) -> Program:
    run = partial(sampling.sample, sampling.variant_of(asked), Columns(logits.shape[1]), tallies=None)
    held = (logits, jnp.arange(len(logits), dtype=jnp.int32), batch(len(logits), asked))
    with kernels.use(native):
        return cast(Program, jax.jit(run, donate_argnums=2).lower(*held).compile())


def batch(rows: int, asked: Sampling) -> state.BatchState:
    """Sequences that do not finish."""
    empty = state.empty_state(rows, 1, 0)
    packed = state.pack_choices([asked] * (rows + 1))
    return empty._replace(
        length=jnp.ones_like(empty.length),
        limit=jnp.full_like(empty.limit, 1 << 30),
        live=jnp.ones_like(empty.live),
        choice=state.Choice(*(jnp.asarray(field) for field in packed)),
    )


def timed(program: Program, logits: jax.Array, asked: Sampling) -> float:
    """Seconds a step."""
    rows, held = jnp.arange(len(logits), dtype=jnp.int32), batch(len(logits), asked)
    held, _, packed = program(logits, rows, held)
    packed.block_until_ready()
    begun = time.perf_counter()
    for _ in range(STEPS):
        held, _, packed = program(logits, rows, held)
    packed.block_until_ready()
    return (time.perf_counter() - begun) / STEPS


if __name__ == "__main__":
    main()

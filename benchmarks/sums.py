"""What sums over GPUs cost a decode step: its products without any, with NCCL's, and with ours.

    python -m benchmarks.sums [--model benchmarks/shapes/llama-3.1-8b.json] [--gpus 2] [--rows 1 64]
    python -m benchmarks.sums --check [--gpus 2]

The products of all layers of the shape, cut over ``tensor``, with norms between them and two sums a layer, on
random bfloat16 numbers: milliseconds a step by turns, and microseconds a sum, which is what a step takes
longer than without any. Results with our sums are compared with those with NCCL's. ``--check`` only compares
sums of many sizes with NumPy's, and what 64 in a row make with NCCL's. Both end after ``--limit`` seconds.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.report import Report, arguments
from benchmarks.roofline import shapes
from llmos.drivers.jax import platform
from llmos.drivers.jax.decoder.layers import product
from llmos.drivers.jax.sharding import exchange
from llmos.drivers.jax.sharding.collectives import total

AXES = ("tensor",)
CUTS = (PartitionSpec("tensor", None), PartitionSpec(None, "tensor")) * 2
SHAPE = Path(__file__).parent / "shapes" / "llama-3.1-8b.json"
KINDS = ("none", "nccl", "exchange")
STEPS, TURNS = 20, 7
CHECKED = (1, 2, 17, 256, 1024, 1025, 7168, 65536, 98304, 131072)  # in 8 bytes

Weights = list[tuple[jax.Array, ...]]


def say(*words: Any) -> None:
    """A line that is seen at once."""
    print(*words, flush=True)


def norm(x: jax.Array) -> jax.Array:
    """Rows of mean square 1."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def step(add: Callable[[jax.Array], jax.Array], weights: Weights, x: jax.Array) -> jax.Array:
    """The products of a decode step, where attention gives back its queries."""

    @jax.jit
    def layer(weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        queries, out, up, down = weights
        heads = product(norm(x), queries)[:, : out.shape[1]]
        x = x + add(product(heads, out))
        gate, value = jnp.split(product(norm(x), up), 2, 1)
        return x + add(product(jax.nn.silu(gate) * value, down))

    for each in weights:
        x = layer(each, x)
    return norm(x)


def chain(add: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """64 sums, each of what the one before made."""
    for _ in range(64):
        x = jnp.tanh(add(x + 0.01 * jax.lax.axis_index(AXES).astype(x.dtype)))
    return x


def compiled(kind: str, mesh: Mesh, run: Callable[..., Any], specs: Any, arguments: tuple[Any, ...]) -> Any:
    """A program over the mesh, with the sums of a kind."""
    add = (lambda x: x) if kind == "none" else partial(total, axes=AXES)
    local = partial(run, add)
    program = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    options = platform.compiler_options(mesh.devices.flat[0], arguments[-1].shape[0]) or {}
    own = kind == "exchange"
    with exchange.use(mesh.size if own else 0):
        traced = jax.jit(program).lower(*arguments)
    if ("llmos_sum" in traced.as_text()) != own:
        raise RuntimeError(f"the program with sums by {kind} has not what it should have")
    return traced.compile(options | exchange.OPTIONS if own else options)


def make(mesh: Mesh, config: dict[str, Any]) -> Weights:
    """Random weights of all layers."""
    fills = [
        jax.jit(partial(drawn, shape=shape), out_shardings=NamedSharding(mesh, cut))
        for shape, cut in zip(shapes(config), CUTS)
    ]
    keys = jax.random.split(jax.random.key(0), config["num_hidden_layers"])
    return [tuple(fill(jax.random.fold_in(key, i)) for i, fill in enumerate(fills)) for key in keys]


def drawn(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A weight that keeps the size of what it is fed with."""
    return jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5


def timed(program: Any, weights: Weights, x: jax.Array) -> float:
    """Milliseconds a step."""
    begun = time.perf_counter()
    for _ in range(STEPS):
        x = program(weights, x)
    x.block_until_ready()
    return (time.perf_counter() - begun) / STEPS * 1e3


def measure(mesh: Mesh, config: dict[str, Any], weights: Weights, rows: int) -> dict[str, Any]:
    """Times of a step of ``rows`` tokens by kind of sum; a kind that fails says why and is left out."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    x = jax.random.normal(jax.random.key(1), (rows, config["hidden_size"]), jnp.bfloat16)
    x = jax.device_put(x, everywhere)
    programs, results = {}, {}
    for kind in KINDS:
        try:
            begun = time.perf_counter()
            specs = ([CUTS for _ in weights], PartitionSpec())
            programs[kind] = compiled(kind, mesh, step, specs, (weights, x))
            results[kind] = np.asarray(programs[kind](weights, x), np.float32)
            say(f"rows {rows:3d} {kind:9s} compiled and run in {time.perf_counter() - begun:.1f} s")
        except RuntimeError:
            say(f"rows {rows} {kind} FAILED")
            traceback.print_exc(limit=-4)
    times: dict[str, list[float]] = {kind: [] for kind in programs}
    for _ in range(TURNS):
        for kind, program in programs.items():
            times[kind].append(timed(program, weights, x))
    figures: dict[str, Any] = {kind: round(statistics.median(each), 4) for kind, each in times.items()}
    sums = 2 * len(weights)
    for kind in figures.keys() & {"nccl", "exchange"}:
        figures[f"{kind}_us_a_sum"] = round((figures[kind] - figures.get("none", 0.0)) / sums * 1e3, 2)
    if {"nccl", "exchange"} <= results.keys():
        figures["differs_by"] = float(np.abs(results["nccl"] - results["exchange"]).max())
        figures["largest"] = float(np.abs(results["nccl"]).max())
    say(f"rows {rows:3d}", figures)
    return figures


def check(mesh: Mesh, width: int) -> dict[str, Any]:
    """Sums of many sizes against NumPy's to the bit, and chains of them against NCCL's."""
    begun = time.perf_counter()
    fitting = [size for size in CHECKED if size * 8 * (mesh.size - 1) <= 2 * exchange.LARGEST]
    exchange.check(mesh.devices.tolist(), fitting, times=10)
    say(f"{20 * len(fitting)} sums are NumPy's to the bit, {time.perf_counter() - begun:.1f} s")
    figures: dict[str, Any] = {}
    for rows in (1, 16, 64):
        x = jax.random.normal(jax.random.key(rows), (rows, width), jnp.bfloat16)
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        made = {}
        for kind in ("nccl", "exchange"):
            program = compiled(kind, mesh, chain, PartitionSpec(), (x,))
            outs = [program(x) for _ in range(20)]
            jax.block_until_ready(outs)
            begun = time.perf_counter()
            jax.block_until_ready([program(x) for _ in range(20)])
            figures[f"{kind}_{rows}_us"] = round((time.perf_counter() - begun) / 20 / 64 * 1e6, 2)
            made[kind] = [np.asarray(out, np.float32) for out in outs]
        apart = max(float(np.abs(a - b).max()) for a, b in zip(made["nccl"], made["exchange"]))
        same = all(np.array_equal(made["exchange"][0], each) for each in made["exchange"])
        say(f"64 sums in a row, {rows} rows: apart by {apart:g}, every time the same: {same}", figures)
        if apart > 0.05 or not same:
            raise RuntimeError("chains of sums differ")
    return figures


def main() -> None:
    parser = arguments("Sums over GPUs.")
    parser.add_argument("--model", type=Path, default=SHAPE, help="config.json of the shape")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--check", action="store_true", help="only whether sums are right")
    parser.add_argument(
        "--limit", type=float, default=100.0, help="seconds after which the program ends itself"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "llmos-sums")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.limit, exit=True)
    config = msgspec.json.decode(options.model.read_bytes())
    devices = jax.devices()[: options.gpus]
    mesh = Mesh(np.asarray(devices), AXES)
    begun = time.perf_counter()
    works = exchange.enable(devices, options.cache)
    say(f"{devices[0].device_kind}: {exchange.state(devices)}, {time.perf_counter() - begun:.1f} s")
    report = Report("sums", environment={"devices": len(devices), "exchange": exchange.state(devices)})
    if options.check:
        if not works:
            sys.exit("there is nothing to check")
        report.figures["check"] = check(mesh, config["hidden_size"])
    else:
        weights = jax.block_until_ready(make(mesh, config))
        for rows in options.rows:
            report.figures[str(rows)] = measure(mesh, config, weights, rows)
    report.write(options.json)


if __name__ == "__main__":
    main()

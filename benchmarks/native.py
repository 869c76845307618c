"""What the CPU's native kernels take by themselves, by turns with what XLA makes of the same.

    python -m benchmarks.native [--part products attention gates] [--rows 1 64 512] [--rounds 5] [--json FILE]

One thread, its own processor time, the best of ``--rounds``: others on the machine cost it little. Products
are of so many rows with matrices of 3,072 x 576 over 56 MB, so that weights come from memory as in a model,
in GFLOP/s. Attention is one layer's in milliseconds, writes of keys and values and their rotation included:
a batch that decodes, prompts, and a chunk of one behind a long context (9 heads, 3 key heads of 64, pages of
16; and the heads of an 8B model). Gates are silu and its product of 512 x 1,536. The peer is XLA.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ["NPROC"] = "1"  # XLA reads it once, when its first device is made

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, arguments
from llmos.drivers.jax.attention.caches import PagedCache, held
from llmos.drivers.jax.attention.native import NativeAttention
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.shared import storage
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import layers, quant
from llmos.drivers.jax.decoder.rope import Turn, rotate, rotation
from llmos.drivers.jax.native import kernels
from llmos.ipc import paths

OUT, INNER, BYTES = 3072, 576, 56 << 20
PAGE, CALLS = 16, 4
ROWS = [1, 2, 4, 8, 16, 31, 64, 128, 512]


@dataclass(frozen=True)
class Case:
    """``rows`` rows have ``start`` tokens, and ``count`` more of each attend."""

    name: str
    rows: int
    start: int
    count: int
    heads: tuple[int, int, int] = (9, 3, 64)
    scoring: Scoring = PLAIN


LLAMA = (32, 8, 128)
CASES = [
    Case("decode 32 x 256", 32, 255, 1),
    Case("decode 1 x 2048", 1, 2047, 1),
    Case("verify 8 x 4 at 256", 8, 252, 4),
    Case("prompt 512", 1, 0, 512),
    Case("prompt 512 behind 3584", 1, 3584, 512),
    Case("prompt 512 behind 3584, window 1024", 1, 3584, 512, scoring=Scoring(window=1024)),
    Case("prompt 512, 8B heads", 1, 0, 512, LLAMA),
]


def race(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of one call of each, the best round of each, by turns."""
    for call in ways.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, call in ways.items():
            begun = time.process_time()
            for _ in range(CALLS):
                jax.block_until_ready(call())
            best[name] = min(best[name], (time.process_time() - begun) / CALLS)
    return best


def values(*shape: int, dtype: Any, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def with_kernels(wanted: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled ``function``, traced so that it may call the kernels, or not."""

    def traced(*given: Any) -> Any:
        with kernels.use(wanted):
            return function(*given)

    return jax.jit(traced)


def products(rows: int, kind: str, rounds: int) -> dict[str, float]:
    """GFLOP/s of products of so many rows with weights of a kind."""
    dtype = jnp.dtype("float32" if kind == "float32" else "bfloat16")
    size = jnp.dtype(kind).itemsize * OUT * INNER
    weights: list[Any] = [(values(OUT, INNER, dtype=dtype, seed=i), None) for i in range(-(-BYTES // size))]
    if kind == "int8":
        weights = [quant.quantised(weight, jnp.int8) for weight, _ in weights]
    x = values(rows, INNER, dtype=dtype)

    def multiply(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        return [layers.product(x, weight, scale=scale) for weight, scale in weights]

    calls = {name: with_kernels(name == "native", multiply) for name in ("native", "xla")}
    found = race({name: partial(call, x, weights) for name, call in calls.items()}, rounds)
    work = 2 * rows * OUT * INNER * len(weights) / 1e9
    return {name: round(work / seconds, 1) for name, seconds in found.items()}


def attend(backend: Any, case: Case, cache: PagedCache, new: tuple[jax.Array, ...], turn: Turn) -> Any:
    """A step's attention in one layer, with the rotation before it."""
    place = case.start + jnp.arange(case.count)
    each = -(-(case.start + case.count) // PAGE)
    tables = jnp.arange(case.rows * each, dtype=jnp.int32).reshape(case.rows, each)
    lengths = jnp.full(case.rows, case.start + case.count, jnp.int32)
    pages, offsets = tables[:, place // PAGE], jnp.tile(place % PAGE, (case.rows, 1))
    q, k, v = new
    if case.count == 1:
        q, k, v = (x[:, 0] for x in (rotate(q, *turn), rotate(k, *turn), v))
        return backend.decode(
            DecodePlan(tables, lengths, pages[:, 0], offsets[:, 0]), cache, q, k, v, case.scoring
        )
    kind = VerifyPlan if case.rows > 1 else PrefillPlan
    plan = kind(tables, jnp.full(case.rows, case.start, jnp.int32), lengths, pages, offsets)
    return backend.extend(plan, cache, Projected.of(q, k, v, turn), scoring=case.scoring)


def attention(case: Case, kind: str, rounds: int) -> dict[str, float]:
    """Milliseconds of one layer."""
    heads, kv_heads, size = case.heads
    dtype = jnp.dtype(kind)
    pages = case.rows * -(-(case.start + case.count) // PAGE)
    shape, kept = (pages, kv_heads, PAGE, size), storage(dtype, on_cpu=True)
    new = tuple(
        values(case.rows, case.count, n, size, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads)
    )
    place = jnp.tile(case.start + jnp.arange(case.count), (case.rows, 1))
    turn = rotation(place, 1e4 ** -(np.arange(0, size, 2, dtype=np.float32) / size))
    ways: dict[str, Callable[[], Any]] = {}
    for name, backend in (("native", NativeAttention()), ("xla", XlaAttention())):
        # A cache of its own that is written in place, as in a step.
        kept_here = [PagedCache(*(held(values(*shape, dtype=dtype, seed=i), kept) for i in (1, 2)))]
        call = jax.jit(partial(attend, backend, case), donate_argnums=0)
        ways[name] = partial(_turn_over, call, kept_here, new, turn)
    return {name: round(1e3 * seconds, 3) for name, seconds in race(ways, rounds).items()}


def _turn_over(call: Callable[..., Any], kept: list[PagedCache], *others: Any) -> jax.Array:
    out: jax.Array
    out, kept[0] = call(kept[0], *others)
    return out


def gates(kind: str, rounds: int) -> dict[str, float]:
    """Milliseconds of silu of 512 x 1,536 times as much."""
    both = values(512, 3072, dtype=jnp.dtype(kind))
    calls = {n: with_kernels(n == "native", partial(layers.gated, "silu")) for n in ("native", "xla")}
    found = race({name: partial(call, both) for name, call in calls.items()}, rounds)
    return {name: round(1e3 * seconds, 3) for name, seconds in found.items()}


def main() -> None:
    parser = arguments("The CPU's native kernels by themselves, and XLA's.")
    parts = ["products", "attention", "gates"]
    parser.add_argument("--part", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of products")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not kernels.enable(paths.cache_dir() / "native"):
        parser.exit(1, f"no native kernels: {kernels.state()}\n")
    lines: dict[str, dict[str, float]] = {}

    def add(name: str, found: dict[str, float]) -> None:
        lines[name] = found
        print(f"{name:48} native {found['native']:9.3f}   xla {found['xla']:9.3f}", flush=True)

    for kind in ("float32", "bfloat16", "int8") if "products" in options.part else ():
        for rows in options.rows:
            add(f"product {kind}, {rows} rows, GFLOP/s", products(rows, kind, options.rounds))
    for kind in ("float32", "bfloat16"):
        for case in CASES if "attention" in options.part else ():
            add(f"{case.name}, {kind}, ms", attention(case, kind, options.rounds))
        if "gates" in options.part:
            add(f"gates {kind}, ms", gates(kind, options.rounds))
    report = Report("native", figures={name: found["native"] for name, found in lines.items()})
    report.peers = {name: found["xla"] for name, found in lines.items()}
    report.ratios = {
        name: round((n / x if "GFLOP" in name else x / n), 2)
        for name, (n, x) in ((name, (found["native"], found["xla"])) for name, found in lines.items())
    }
    report.write(options.json)


if __name__ == "__main__":
    main()

"""What one layer's attention costs on a GPU, by backend, against the bytes and the products it needs.

    python -m benchmarks.attention --part decode|chunks [--bandwidth 4.3] [--tflops 790] [--json FILE]

The 8B shape (32 heads, 8 KV heads of 128) and a layer with windows and caps (8 heads, 4 KV heads of 256), in
bfloat16 and pages of 64. Each line runs a backend's method as a step does, the KV writes included, and of
single tokens the turning of queries and keys ("apart": in kernels of their own); ``us`` is the best of
several rounds. What does all in one kernel has one more here, that joins queries, keys and values. ``floor``
is the larger of the time to read the keys and values that can be seen at ``bandwidth`` TB/s, and that of the
products at ``tflops``. The start of a prompt is computed as it is picked (cuDNN where it can) and, by the
other lines, like any chunk, from pages.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, arguments
from llmos.drivers.jax.attention.backend import Paged
from llmos.drivers.jax.attention.caches import PagedCache
from llmos.drivers.jax.attention.pallas import PallasAttention
from llmos.drivers.jax.attention.plans import PLAIN, DecodePlan, PrefillPlan, Scoring, VerifyPlan
from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.rope import Turn, rotation

PAGE = 64
CALLS, ROUNDS = 20, 4
FEW = 16  # from so many queries on they are a chunk


@dataclass(frozen=True)
class Case:
    """``rows`` rows have ``start`` tokens; ``queries`` more of each attend."""

    name: str
    rows: int
    start: int
    queries: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    scoring: Scoring = PLAIN
    kv: Any = jnp.bfloat16
    fresh: bool = False


GEMMA: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 256}
MISTRAL = Scoring(window=1024)
CAPPED = Scoring(window=4096, cap=50.0)
DECODES = [
    Case("decode", 256, 639, 1),
    Case("decode int8", 256, 639, 1, kv=jnp.int8),
    Case("decode", 32, 2047, 1),
    Case("decode", 1, 2047, 1),
    Case("decode window 1024", 64, 4095, 1, scoring=MISTRAL),
    Case("decode caps 256", 64, 2047, 1, **GEMMA, scoring=CAPPED),
    Case("verify", 64, 1019, 5),
]
CHUNKS = [
    Case("fresh", 1, 0, 2048, fresh=True),
    Case("fresh window 1024", 1, 0, 4096, scoring=MISTRAL, fresh=True),
    Case("fresh caps 256", 1, 0, 2048, **GEMMA, scoring=CAPPED, fresh=True),
    Case("chunk", 1, 2048, 2048),
    Case("chunk", 1, 8192, 512),
]


class Apart(PallasAttention):
    """Turns, writes and attends in kernels of their own."""

    step = Paged.step


XLA = XlaAttention(tokens_in_flight=8192)
PICKED = "as picked"
DECODERS: dict[str, Any] = {
    "pallas 4w 2s": PallasAttention(),
    "pallas 4w 3s": PallasAttention(stages=3),
    "pallas apart": Apart(),
    "xla": XLA,
}
CHUNKERS: dict[str, Any] = {
    PICKED: PallasAttention(),
    "pallas 8w 2s": PallasAttention(),
    "pallas 8w 3s": PallasAttention(stages=3),
    "pallas 4w 2s": PallasAttention(warps=2),
    "xla": XLA,
}
PARTS: dict[str, tuple[list[Case], dict[str, Any]]] = {
    "decode": (DECODES, DECODERS),
    "chunks": (CHUNKS, CHUNKERS),
}


def plan(case: Case) -> PrefillPlan:
    """Pages of rows that lie scattered."""
    total = case.start + case.queries
    width = 1 << (-(-total // PAGE) - 1).bit_length()
    tables = np.random.default_rng(0).permutation(case.rows * width).reshape(case.rows, width)
    position = np.tile(case.start + np.arange(case.queries), (case.rows, 1))
    pages = np.take_along_axis(tables, position // PAGE, axis=1)
    starts = np.full(case.rows, case.start)
    return PrefillPlan(
        *(jnp.asarray(x, jnp.int32) for x in (tables, starts, starts + case.queries, pages, position % PAGE))
    )


def attend(
    backend: Any, case: Case, paged: bool, plan: PrefillPlan, cache: PagedCache, given: tuple[jax.Array, ...]
) -> tuple[jax.Array, PagedCache]:
    """One layer's attention as the step of this case runs it; ``paged``: not as the start of a prompt."""
    q, k, v, *turn = given
    out: tuple[jax.Array, PagedCache]
    if case.queries == 1:
        one = DecodePlan(plan.tables, plan.lengths, plan.pages[:, 0], plan.offsets[:, 0])
        new = Projected.of(q[:, 0], k[:, 0], v[:, 0], Turn(*turn))
        out = backend.step(one, cache, new, case.scoring)
    elif case.queries < FEW:
        out = backend.verify(VerifyPlan(*plan), cache, q, k, v, case.scoring)
    else:
        out = backend.prefill(plan, cache, q, k, v, case.fresh and not paged, case.scoring)
    return out


def measure(case: Case, backend: Any, paged: bool) -> float:
    """Seconds of a call, the best of several rounds of calls that follow from each other."""
    where = plan(case)
    shape = (where.tables.size + 1, case.kv_heads, PAGE, case.head_dim)
    keys = iter(jax.random.split(jax.random.key(0), 5))
    cache = pages(next(keys), next(keys), shape, case.kv)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (normal(next(keys), (case.rows, case.queries, n, case.head_dim)) for n in heads)

    def calls(where: PrefillPlan, cache: PagedCache, q: jax.Array) -> tuple[jax.Array, PagedCache]:
        turn = rotation(where.starts, (1e4 ** -np.linspace(0, 1, case.head_dim // 2)).astype(np.float32))

        def once(_: Any, carry: tuple[jax.Array, PagedCache]) -> tuple[jax.Array, PagedCache]:
            out, cache = attend(backend, case, paged, where, carry[1], (carry[0], k, v, *turn))
            return out.reshape(q.shape), cache

        result: tuple[jax.Array, PagedCache] = jax.lax.fori_loop(0, CALLS, once, (q, cache))
        return result

    run = jax.jit(calls, donate_argnums=1)
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        out, cache = run(where, cache, q)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - begun) / CALLS)
    return best


@partial(jax.jit, static_argnums=1)
def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


@partial(jax.jit, static_argnums=(2, 3))
def pages(first: jax.Array, second: jax.Array, shape: tuple[int, ...], kv: Any) -> PagedCache:
    """Random pages of dtype ``kv``."""
    parts = normal(first, shape), normal(second, shape)
    if not quant.is_quantised(kv):
        return PagedCache(*parts)
    (keys, k_scale), (values, v_scale) = (quant.quantise(part, kv) for part in parts)
    return PagedCache(keys, values, k_scale, v_scale)


def floor(case: Case, bandwidth: float, tflops: float) -> float:
    """Seconds that reading what is seen and multiplying with it take at least."""
    ends = case.start + 1 + np.arange(case.queries)
    window = case.scoring.window or int(ends[-1])
    first = max(0, int(ends[0]) - window)
    read = case.rows * (int(ends[-1]) - first) * 2 * case.kv_heads * case.head_dim
    work = 4 * case.rows * int(np.minimum(ends, window).sum()) * case.heads * case.head_dim
    return max(read * jnp.dtype(case.kv).itemsize / bandwidth / 1e12, work / tflops / 1e12)


def main() -> None:
    parser = arguments("Attention of one layer by backend.")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--tflops", type=float, default=790.0)
    options = parser.parse_args()
    report = Report(f"attention {options.part}")
    print(f"{'case':20} {'rows':>4} {'start':>5} {'new':>5} {'backend':12} {'us':>8} {'floor us':>8} ratio")
    cases, backends = PARTS[options.part]
    for case in cases:
        least = floor(case, options.bandwidth, options.tflops)
        for name, backend in backends.items():
            if name == PICKED and not case.fresh:
                continue
            took = measure(case, backend, paged=name != PICKED)
            line = f"{case.name:20} {case.rows:4} {case.start:5} {case.queries:5} {name:12}"
            print(f"{line} {took * 1e6:8.1f} {least * 1e6:8.1f} {took / least:5.2f}", flush=True)
            report.figures[" ".join(line.split())] = round(took * 1e6, 1)
    report.environment = {"device": jax.devices()[0].device_kind}
    report.write(options.json)


if __name__ == "__main__":
    main()

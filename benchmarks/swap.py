"""Moving the KV of a task between device and RAM: bandwidth against the bare link, and what others notice.

    python -m benchmarks.swap --model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 \
        --page-tokens 64 --batch 64 --chunk-tokens 2048

The pages of a task of ``--tokens`` tokens go out and come back through the SDK's own executor and worker, in
one process with the engine. The link is measured by plain jax copies of as many bytes in one piece; the best
of pinned and of pageable memory counts. Then a batch decodes with and without moves beside it, in turns.
"""

from __future__ import annotations

import select
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, arguments
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import (
    Chunk,
    LoadedModel,
    LoadRequest,
    Move,
    Moved,
    Quantum,
    QuantumDone,
    Start,
    Step,
)
from llmos.drivers.sdk.moves import Moves
from llmos.ipc.background import Background
from llmos.ipc.errors import LLMOSError

WARM_STEPS = 8
QUANTUM_STEPS = 8


class Loop:
    """As much of a service's loop as a driver needs; also the sink of quanta and moves."""

    def __init__(self, driver: JaxDriver) -> None:
        self._poll = select.poll()
        self._take: Callable[[], None] = lambda: None
        self._quanta = 0
        self._driver = driver
        self.executor = Executor(driver)
        self.moves = Moves(self.executor, Background(self))  # type: ignore[arg-type]
        self.steps: list[float] = []
        self.moved: list[float] = []

    def on_readable(self, source: int, function: Callable[[], None]) -> None:
        self._poll.register(source, select.POLLIN)
        self._take = function

    def turn(self) -> None:
        busy = self.executor.advance()
        if self._poll.poll(0 if busy else 1):
            self._take()

    def quantum(self, steps: int, **fields: Any) -> None:
        self._quanta += 1
        self.executor.submit(Quantum(id=self._quanta, model="bench", steps=steps, **fields), self)

    def run(self, steps: int, **fields: Any) -> None:
        """One quantum, to its last step."""
        target = len(self.steps) + steps
        self.quantum(steps, **fields)
        while len(self.steps) < target:
            self.turn()

    def swap(self, source: Any, target: Any, count: int, first: int) -> float:
        """Move ``count`` pages from ``first`` on, or back there; the seconds until the answer."""
        begun = time.perf_counter()
        self.begin_swap(source, target, count, first)
        known = len(self.moved)
        while len(self.moved) == known:
            self.turn()
        return time.perf_counter() - begun

    def begin_swap(self, source: Any, target: Any, count: int, first: int) -> None:
        pages = [(first + i, i) if source == "device" else (i, first + i) for i in range(count)]
        move = Move(model="bench", source=source, target=target, pages=pages, tenant="bench")
        begin = lambda: self._driver.move(move, b"")  # noqa: E731
        self.moves.submit(move.model, move.replica, begin, self, reads_device=source == "device")

    def step(self, step: Step) -> None:
        self.steps.append(time.perf_counter())

    def done(self, result: QuantumDone | Moved) -> None:
        if isinstance(result, Moved):
            self.moved.append(time.perf_counter())

    def fail(self, error: LLMOSError) -> None:
        raise error


def link_rates(device: Any, size: int, repeats: int) -> dict[str, float]:
    """GB/s of plain copies of ``size`` bytes in one piece."""
    near = jax.sharding.SingleDeviceSharding(device)
    far = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    there = jax.block_until_ready(jnp.zeros(size, jnp.uint8, device=near))
    here = np.zeros(size, np.uint8)
    pinned = jax.device_put(there, far)
    ways: dict[str, Callable[[], Any]] = {
        "out_pinned": lambda: jax.device_put(there, far, may_alias=False),
        # A new array each time, since jax keeps the host copy of one it has copied.
        "out_pageable": lambda: np.array(jax.device_put(there, near, may_alias=False)),
        "in_pinned": lambda: jax.device_put(pinned, near, may_alias=False),
        "in_pageable": lambda: jax.device_put(here, near, may_alias=False),
    }
    rates = {}
    for name, way in ways.items():
        times = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            jax.block_until_ready(way())
            times.append(time.perf_counter() - begun)
        rates[name] = round(size / statistics.median(times[1:]) / 1e9, 2)
    return rates


def swap_rates(loop: Loop, size: int, count: int, first: int, repeats: int) -> dict[str, float]:
    """GB/s of moving ``count`` pages of ``size`` bytes in all, on an idle device."""
    out, back = [], []
    for _ in range(repeats + 1):
        out.append(loop.swap("device", "host", count, first))
        back.append(loop.swap("host", "device", count, first))
    seconds = {"out": statistics.median(out[1:]), "in": statistics.median(back[1:])}
    rates = {f"{way}_gb_per_s": round(size / value / 1e9, 2) for way, value in seconds.items()}
    return rates | {f"{way}_ms": round(value * 1e3, 2) for way, value in seconds.items()}


def decode_rate(loop: Loop, slots: list[int], steps: int, swaps: Iterator[None] | None) -> float:
    """Steps per second of a full batch; ``swaps`` begins a new move whenever it is advanced."""
    first, moved = len(loop.steps), len(loop.moved)
    for _ in range(2):
        loop.quantum(QUANTUM_STEPS, decode=slots)
    sent = 2 * QUANTUM_STEPS
    if swaps is not None:
        next(swaps)
    while len(loop.steps) - first < steps:
        loop.turn()
        if sent < steps and sent - (len(loop.steps) - first) <= QUANTUM_STEPS:
            loop.quantum(QUANTUM_STEPS, decode=slots)
            sent += QUANTUM_STEPS
        if swaps is not None and len(loop.moved) > moved:
            moved = len(loop.moved)
            next(swaps)
    times = loop.steps[first:]
    while swaps is not None and len(loop.moved) == moved:
        loop.turn()
    return (len(times) - 1) / (times[-1] - times[0])


def endless_swaps(loop: Loop, count: int, first: int) -> Iterator[None]:
    """Out and back again, a move at a time."""
    while True:
        loop.begin_swap("device", "host", count, first)
        yield
        loop.begin_swap("host", "device", count, first)
        yield


def admit(loop: Loop, loaded: LoadedModel, slots: int, prompt: int, total: int) -> None:
    """Fill the batch with sequences that will not end during the measurement."""
    each = -(-total // loaded.page_tokens)
    for slot in range(slots):
        tokens = [3 + (7 * i + 11 * slot) % (loaded.vocab_size - 3) for i in range(prompt)]
        pages = list(range(slot * each, (slot + 1) * each))
        start = Start(slot=slot, tokens=tokens, prompt=prompt, pages=pages, limit=total)
        starts = range(0, prompt, loaded.chunk_tokens)
        chunks = [
            Chunk(step, slot, at, min(loaded.chunk_tokens, prompt - at)) for step, at in enumerate(starts)
        ]
        loop.run(len(chunks), start=[start], chunks=chunks)


def main() -> None:
    """Measure and print, or write as JSON."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=4096, help="size of the task that is swapped")
    parser.add_argument("--batch", type=int, default=8, help="sequences that decode meanwhile")
    parser.add_argument("--context", type=int, default=256, help="their prompts")
    parser.add_argument("--steps", type=int, default=128, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    options = parser.parse_args()
    steps = -(-options.steps // QUANTUM_STEPS) * QUANTUM_STEPS
    total = options.context + WARM_STEPS + 2 * steps * (options.rounds + 1) + 1
    count = -(-options.tokens // options.page_tokens)
    first = options.batch * -(-total // options.page_tokens)
    driver = JaxDriver()
    request = LoadRequest(
        model="bench",
        source=options.model,
        cache=options.cache,
        dtype=options.dtype,
        kv_dtype=options.dtype,
        pages=first + count,
        page_tokens=options.page_tokens,
        chunk_tokens=options.chunk_tokens,
        slots=options.batch,
        max_context=total,
        host_pages=count,
    )
    loaded = driver.load(request, lambda _: None)
    loop, size = Loop(driver), count * loaded.page_bytes
    link = link_rates(jax.devices()[0], size, options.rounds)
    swap = swap_rates(loop, size, count, first, options.rounds)
    admit(loop, loaded, options.batch, options.context, total)
    slots = list(range(options.batch))
    loop.run(WARM_STEPS, decode=slots)
    alone, beside = [], []
    swaps = endless_swaps(loop, count, first)
    before, spent = len(loop.moved), 0.0
    for _ in range(options.rounds + 1):
        alone.append(decode_rate(loop, slots, steps, None))
        begun = time.perf_counter()
        beside.append(decode_rate(loop, slots, steps, swaps))
        spent += time.perf_counter() - begun
    moves = len(loop.moved) - before
    decode = {
        "alone_steps_per_s": round(statistics.median(alone[1:]), 2),
        "beside_moves_steps_per_s": round(statistics.median(beside[1:]), 2),
        "moved_beside_gb_per_s": round(moves * size / spent / 1e9, 2),
    }
    best = {
        "out": max(link["out_pinned"], link["out_pageable"]),
        "in": max(link["in_pinned"], link["in_pageable"]),
    }
    report = Report("swap")
    report.figures = {"bytes": size, "page_bytes": loaded.page_bytes, "swap": swap, "decode": decode}
    report.peers = {"plain_jax_copies_gb_per_s": link}
    report.ratios = {
        "swap_out_of_link": round(swap["out_gb_per_s"] / best["out"], 3),
        "swap_in_of_link": round(swap["in_gb_per_s"] / best["in"], 3),
        "decode_beside_moves": round(
            statistics.median(b / a for a, b in zip(alone[1:], beside[1:], strict=True)), 3
        ),
    }
    report.environment = {"device": driver.describe().devices[0].name, "attention": loaded.attention}
    report.write(options.json)


if __name__ == "__main__":
    main()

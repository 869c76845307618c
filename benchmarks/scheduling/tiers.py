"""More live contexts than the device holds: with host memory behind it, without, and with enough of its own.

The device is an H200 with an 8B model: pages of 64 tokens and 8 MiB, 64 slots, contexts of some 4,000 tokens;
host memory is 50 GB/s away each way at once.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.scheduling import traces
from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import LLMOSError
from llmos.ipc.grant import Band
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.simulated_cache import LinkTime
from llmos.services.scheduler.simulator import Simulator
from llmos.services.scheduler.task import Task

SLOTS, PAGE_TOKENS, PAGE_BYTES = 64, 64, 8 << 20
CONTEXT, TURN, ANSWER = 4000, 128, 128
HELD = 72  # contexts of one conversation that the small device holds
LIVE = 3 * HELD
PAGES = 76  # of the largest context
SETUPS = {"enough device memory": (LIVE, 0), "host tier": (HELD, 4 * LIVE), "recompute": (HELD, 0)}
Figures = dict[str, Any]


def model(contexts: int, host_contexts: int) -> LoadedModel:
    """A device, and host memory, for so many contexts."""
    return LoadedModel(
        model="m", family="null", parameters=0, weight_bytes=0, pages=contexts * PAGES,
        page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES, slots=SLOTS, max_context=8192, chunk_tokens=2048,
        vocab_size=256, stop_tokens=[], attention="none", host_pages=host_contexts * PAGES,
    )  # fmt: skip


class Conversations(Simulator):
    """``LIVE`` conversations that go on as soon as they are answered, for ``turns`` turns."""

    def __init__(self, contexts: int, host_contexts: int, turns: int) -> None:
        super().__init__(model(contexts, host_contexts), traces.STEP, link_time=LinkTime())
        self._random, self._turns, self._ids = random.Random(5), turns, 0
        self.ended: list[tuple[float, Task]] = []
        for number in range(LIVE):
            self._say([self._random.randrange(256) for _ in range(CONTEXT)], number * 1e-3, 0)

    def _say(self, tokens: list[int], at: float, turn: int) -> None:
        self._ids += 1
        task = Task(self._ids, "t", "t", "m", "batch", tokens, len(tokens), len(tokens) + ANSWER, at)
        task.label = str(turn)
        self.submit([task])

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        super().finish(task, reason, error)
        self.ended.append((self.now, task))
        turn = int(task.label) + 1
        if turn < self._turns and error is None:
            more = [self._random.randrange(256) for _ in range(TURN)]
            self._say([*task.tokens, *more][-CONTEXT - TURN * self._turns * 2 :], self.now, turn)


def conversations() -> Figures:
    """Closed-loop chat: answered tokens a second once every conversation has had its first turn."""
    found: Figures = {}
    for name, (device, host) in SETUPS.items():
        sim = Conversations(device, host, turns=4)
        sim.run()
        begin = sorted(at for at, task in sim.ended if task.label == "0")[-1]
        # While all conversations are alive: until the first has had its last turn.
        end = min(at for at, task in sim.ended if task.label == "3")
        later = [task for at, task in sim.ended if begin < at <= end] or [task for _, task in sim.ended]
        span = end - begin if end > begin else sim.now
        found[name] = {
            "tokens_per_s": round(len(later) * ANSWER / span),
            "all_done_s": round(sim.now, 2),
            "failed": sum(record.error is not None for record in sim.records.values()),
            "prefilled": sim.prefilled,
            "moved_gib": round(sim.moved_bytes / 2**30),
            "cached": round(sim.memory.hit_tokens / sim.memory.lookup_tokens, 3),
        }
    return _compared(found)


def displaced() -> Figures:
    """Batch tasks hold the device; waves of interactive ones displace them, and realtime ones those: three
    times the contexts that fit are under way, each of which was begun and will go on."""
    found: Figures = {}
    for name, (device, host) in SETUPS.items():
        sim = Simulator(model(device, host), traces.STEP, link_time=LinkTime())
        tasks = _waves()
        sim.submit(tasks)
        sim.run()
        made = sum(task.produced for task in tasks)
        found[name] = {
            "tokens_per_s": round(made / sim.now),
            "all_done_s": round(sim.now, 2),
            "failed": sum(record.error is not None for record in sim.records.values()),
            "prefilled": sim.prefilled,
            "moved_gib": round(sim.moved_bytes / 2**30),
            "swapped": sim.core.swapping.swapped,
            "displaced": sim.core.seating.displaced,
        }
    return _compared(found)


def _waves() -> list[Task]:
    rng = random.Random(3)
    made: list[Task] = []

    def wave(count: int, band: Band, output: int, at: float) -> None:
        for number in range(count):
            tokens = [rng.randrange(256) for _ in range(CONTEXT - number % 7 * 100)]
            task = Task(len(made), band, band, "m", band, tokens, len(tokens), len(tokens) + output, at)
            made.append(task)

    wave(2 * SLOTS, "batch", 700, 0.0)
    for at in (12.0, 42.0):
        wave(SLOTS, "interactive", 400, at)
        wave(SLOTS, "realtime", 150, at + 9.0)
    return made


def _compared(found: Figures) -> Figures:
    whole = found["enough device memory"]["all_done_s"]
    for line in found.values():
        line["of_enough"] = round(whole / line["all_done_s"], 3)
    return found

"""Eight models on one device: a fixed eighth of the KV memory for each, against one pool of slabs for all.

The device is an H200 with some 12 GiB left for KV beside the weights of models from 0.5B to 8B. Traffic is
Zipf over the models: the same all the time, with another model in front every four seconds, or even.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

from llmos.drivers.sdk.messages import LoadedModel
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Task

Figures = dict[str, Any]
SLABS, SLAB_BYTES = 128, 96 << 20
SLOTS, PAGE_TOKENS = 64, 16
SECONDS, TURN = 12.0, 4.0
# KV bytes of a token, and the size of the model relative to 8B.
SHAPES = [
    (131072, 1.0),
    (57344, 0.95),
    (114688, 0.4),
    (36864, 0.4),
    (65536, 0.15),
    (28672, 0.2),
    (24576, 0.08),
    (12288, 0.06),
]
NAMES = [f"m{number}" for number in range(len(SHAPES))]


def models(shared: bool, slabs: int = SLABS, count: int = len(SHAPES)) -> list[tuple[LoadedModel, StepTime]]:
    """The models with a share of the memory each, or in one pool."""
    made = []
    for name, (token_bytes, scale) in zip(NAMES[:count], SHAPES[:count], strict=True):
        page_bytes = PAGE_TOKENS * token_bytes
        slab_pages = SLAB_BYTES // page_bytes
        sizes: dict[str, Any] = {"slabs": slabs, "slab_pages": slab_pages, "slab_bytes": SLAB_BYTES}
        pages = slabs * slab_pages if shared else slabs * SLAB_BYTES // count // page_bytes
        loaded = LoadedModel(
            model=name, family="null", parameters=0, weight_bytes=0, pages=pages, page_tokens=PAGE_TOKENS,
            page_bytes=page_bytes, slots=SLOTS, max_context=4096, chunk_tokens=2048, vocab_size=256,
            stop_tokens=[], attention="none", **({"pool": "p"} | sizes if shared else {}),
        )  # fmt: skip
        step = StepTime(4.6e-3 * scale + 3e-4, 7.0e-6, 4.2e-8 * token_bytes / 131072, 2.1e-5 * scale)
        made.append((loaded, step))
    return made


def traffic(rate: float, order: Callable[[float], list[str]], skew: float) -> list[Task]:
    """Requests at ``rate`` a second; ``order`` names the models at a time, the most wanted first."""
    rng, made, at = random.Random(11), list[Task](), 0.0
    weights = [1.0 / (rank + 1) ** skew for rank in range(len(NAMES))]
    for id in itertools.count():
        at += rng.expovariate(rate)
        if at > SECONDS:
            return made
        (name,) = rng.choices(order(at), weights)
        tokens = [rng.randrange(256) for _ in range(rng.randint(256, 2048))]
        output = rng.randint(64, 384)
        tenant = f"t{id % 5}"
        made.append(
            Task(
                id,
                tenant,
                tenant,
                name,
                "interactive",
                tokens,
                len(tokens),
                len(tokens) + output,
                at,
            )
        )
    raise AssertionError


def _shuffled() -> list[str]:
    """Popularity has nothing to do with size."""
    names = list(NAMES)
    random.Random(3).shuffle(names)
    return names


def _rotated(at: float) -> list[str]:
    names, by = _shuffled(), int(at / TURN)
    return names[by:] + names[:by]


TRAFFIC: dict[str, tuple[float, Callable[[float], list[str]], float]] = {
    "Zipf": (22.0, lambda at: _shuffled(), 1.2),
    "Zipf, turning": (22.0, _rotated, 1.2),
    "even": (22.0, lambda at: _shuffled(), 0.0),
}


def pool() -> Figures:
    """Tokens a second while requests come and until all are served, and time to first token."""
    found: Figures = {}
    for (name, asked), shared in itertools.product(TRAFFIC.items(), (False, True)):
        (first, step), *others = models(shared)
        sim = Simulator(first, step, beside=others)
        tasks = traffic(*asked)
        sim.submit(tasks)
        sim.run()
        records = list(sim.records.values())
        served = sum(at <= SECONDS for record in records for at in record.times)
        made = sum(len(record.times) for record in records)
        firsts = sorted(record.first_token for record in records)
        worst = [
            max((r.first_token for r in records if r.task.model == model), default=0.0) for model in NAMES
        ]
        found.setdefault(name, {})["shared" if shared else "static"] = {
            "tokens_per_s_while_asked": round(served / SECONDS),
            "tokens_per_s_to_the_end": round(made / sim.now),
            "first_token_p50_s": round(firsts[len(firsts) // 2], 3),
            "first_token_p99_s": round(firsts[int(0.99 * len(firsts))], 3),
            "worst_first_token_by_model_s": [round(each, 2) for each in worst],
            "all_done_s": round(sim.now, 1),
            "displaced": sim.core.seating.displaced,
            "failed": sum(record.error is not None for record in records),
        }
    return found

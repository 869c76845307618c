"""Random mixes of tasks, up to the whole memory, on models that share it: against the same tasks let in one
after the other as far as they fit, each with all the pages that it will ever need.

The device is an H200 with 0.75 GiB left for KV, in 8 slabs: 6,144 tokens of the largest of four models; or
one whose prompt tokens take 50 times as long beside its steps, as a CPU's do. More than three times as many
contexts as memory holds are live at once.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.scheduling.models import NAMES, PAGE_TOKENS, models
from llmos.ipc.errors import LLMOSError
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.messages import Reason
from llmos.services.scheduler.simulator import Record, Simulator
from llmos.services.scheduler.task import Task

Figures = dict[str, Any]
SLABS, MODELS = 8, 4
AMPLE = 64 * SLABS
MOST = 0.9  # of all tokens: the time until so many are made does not depend on who is last


@dataclass(frozen=True)
class Mix:
    """``count`` tasks within ``seconds``; each needs from ``least`` to ``most`` of the whole memory, evenly
    spread or by orders of magnitude. Prompts take ``dear`` times as long as on an H200."""

    least: float
    most: float
    count: int
    seconds: float
    even: bool = True
    bands: tuple[int, ...] = (1,)
    dear: float = 1.0

    def tasks(self, seed: int) -> list[Task]:
        rng = random.Random(seed)
        return [self._task(id, rng) for id in range(self.count)]

    def _task(self, id: int, rng: random.Random) -> Task:
        number = rng.randrange(MODELS)
        if self.even:
            part = rng.uniform(self.least, self.most)
        else:
            part = self.least * (self.most / self.least) ** rng.random()
        (model, _) = models(True, SLABS, MODELS)[number]
        size = max(32, int(part * model.pages * PAGE_TOKENS))
        prompt = int(size * rng.uniform(0.2, 0.8))
        tokens = [rng.randrange(256) for _ in range(prompt)]
        tenant, band = f"t{id % 5}", BANDS[rng.choice(self.bands)]
        return Task(
            id, tenant, tenant, NAMES[number], band, tokens, prompt, size, rng.uniform(0, self.seconds)
        )


class Packed(Simulator):
    """Lets a task in when all that it will need is free, and so displaces nobody: the first that waits, or
    with ``first_fit`` whoever fits."""

    first_fit = False

    def submit(self, tasks: Iterable[Task]) -> None:
        self._waiting, self._taken = deque[Task](), defaultdict[str, int](int)
        for task in tasks:
            self.records[task.id] = Record(task)
            self.at(task.arrived, lambda task=task: self._come(task))  # type: ignore[misc]

    def finish(self, task: Task, reason: Reason | None, error: LLMOSError | None) -> None:
        super().finish(task, reason, error)
        self._taken[task.model] -= self._pages(task)
        self.soon(self._let_in)

    def _come(self, task: Task) -> None:
        self._waiting.append(task)
        self._let_in()

    def _let_in(self) -> None:
        for task in list(self._waiting):
            if self._fits(task):
                self._waiting.remove(task)
                self._taken[task.model] += self._pages(task)
                self._arrive(task)
            elif not self.first_fit:
                return

    def _pages(self, task: Task) -> int:
        return -(-task.limit // PAGE_TOKENS)

    def _fits(self, task: Task) -> bool:
        slabs = 0
        for host in self.hosts:
            name, size = host.model.model, host.model.slab_pages
            slabs += -(-(self._taken[name] + (self._pages(task) if name == task.model else 0)) // size)
        return slabs <= SLABS


class FirstFit(Packed):
    first_fit = True


MIXES: dict[str, Mix] = {
    "side by side": Mix(0.01, 0.1, 100, 5.0),
    "up to all": Mix(0.05, 1.0, 25, 5.0),
    "side by side, dear prompts": Mix(0.01, 0.1, 100, 5.0, dear=50.0),
    "up to all, dear prompts": Mix(0.05, 1.0, 25, 5.0, dear=50.0),
}
SETUPS: dict[str, tuple[Callable[..., Simulator], int]] = {
    "ample": (Simulator, AMPLE),
    "LLM OS": (Simulator, SLABS),
    "packed": (Packed, SLABS),
    "packed, first fit": (FirstFit, SLABS),
}


def run(
    kind: Callable[..., Simulator], slabs: int, mix: Mix, seed: int = 1, until: float = float("inf")
) -> Figures:
    """The figures of one set of tasks."""
    tasks = mix.tasks(seed)
    (first, step), *others = (
        (model, replace(step, prefill=mix.dear * step.prefill)) for model, step in models(True, slabs, MODELS)
    )
    sim = kind(first, step, beside=others)
    sim.submit(tasks)
    sim.run(until)
    records = list(sim.records.values())
    times = sorted(at for record in records for at in record.times)
    total = sum(task.limit - task.prompt for task in tasks)
    most = times[int(MOST * total)] if len(times) > int(MOST * total) else float("inf")
    prompts = sum(task.prompt for task in tasks)
    return {
        "most_done_s": round(most, 1),
        "all_done_s": round(max(record.ended for record in records), 1),
        "unfinished": sum(record.reason is None for record in records) + len(tasks) - len(records),
        "displaced_per_task": round(sum(task.displaced for task in tasks) / len(tasks), 2),
        "most_displaced": max(task.displaced for task in tasks),
        "prompts_computed": round(sim.prefilled / prompts, 2),
        "worst_first_token_s": round(max((r.first_token for r in records if r.times), default=0.0), 1),
    }


def mixes() -> Figures:
    """Seconds until nine tenths of the tokens are made and until all are, by mix and by who lets tasks in."""
    found: Figures = {}
    for (name, mix), (setup, (kind, slabs)) in itertools.product(MIXES.items(), SETUPS.items()):
        found.setdefault(name, {})[setup] = run(kind, slabs, mix)
    return found

"""Synthetic traffic, the same for every policy; times in seconds, lengths in tokens."""

from __future__ import annotations

import random

from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.grant import Band
from llmos.services.scheduler.simulator import StepTime
from llmos.services.scheduler.task import Task

STEP = StepTime()
SLOTS = 64


def model(slots: int = SLOTS, pages: int = 8192) -> LoadedModel:
    """An 8B model on an H200, with fewer slots so that they are short sooner."""
    return LoadedModel(
        model="m", family="null", parameters=0, weight_bytes=0, pages=pages, page_tokens=16, page_bytes=0,
        slots=slots, max_context=8192, chunk_tokens=2048, vocab_size=256, stop_tokens=[], attention="none",
    )  # fmt: skip


class Traffic:
    """Makes tasks with ids of its own from one seed."""

    def __init__(self, seed: int = 7) -> None:
        self.random = random.Random(seed)
        self.made: list[Task] = []

    def task(
        self,
        band: Band,
        tenant: str,
        prompt: int,
        output: int,
        at: float,
        *,
        slack: float = 0.0,
        weight: float = 1.0,
    ) -> Task:
        """One task; with ``slack`` its deadline is that many times what it takes on an idle device."""
        tokens = [self.random.randrange(256) for _ in range(prompt)]
        made = Task(
            len(self.made), tenant, tenant, "m", band, tokens, prompt, prompt + output, at, weight=weight
        )
        if slack:
            made.deadline = at + slack * (STEP.prefill * prompt + (STEP.base + STEP.row) * output)
        self.made.append(made)
        return made

    def poisson(
        self, band: Band, tenant: str, rate: float, seconds: float,
        prompt: tuple[int, int], output: tuple[int, int],
        *, begin: float = 0.0, slack: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Arrivals at ``rate`` a second; lengths and slack uniform in their ranges."""
        at = begin
        while (at := at + self.random.expovariate(rate)) < begin + seconds:
            self.task(
                band, tenant, self.random.randint(*prompt), self.random.randint(*output), at,
                slack=self.random.uniform(*slack) if slack else 0.0,
            )  # fmt: skip


def saturated(seconds: float = 12.0) -> list[Task]:
    """Batch work that fills all slots, and now and then someone urgent."""
    traffic = Traffic()
    for i in range(2 * SLOTS + 4 * int(seconds)):
        traffic.task(
            "batch", f"batch{i % 4}", traffic.random.randint(100, 500), traffic.random.randint(100, 400), 0.0
        )
    traffic.poisson("interactive", "chat", 6.0, seconds, (32, 512), (16, 64), begin=0.5)
    traffic.poisson("realtime", "voice", 3.0, seconds, (32, 128), (8, 24), begin=0.5, slack=(6, 12))
    return traffic.made


def realtime(rate: float, count: int = 500) -> list[Task]:
    """Nothing but deadlines, 3 to 10 times what a task takes on an idle device."""
    traffic = Traffic()
    traffic.poisson("realtime", "rt", rate, count / rate, (64, 1024), (16, 128), slack=(3, 10))
    return traffic.made


def flood(size: int, saturated: bool) -> list[Task]:
    """Three tenants at some 0.8 of what can be done, or one of them with more than that; the flooder sends
    ``size`` requests more at once."""
    traffic = Traffic()
    for _ in range(800 * saturated):
        traffic.task(
            "interactive", "third", traffic.random.randint(64, 512), traffic.random.randint(64, 192), 0.0
        )
    for tenant, rate in (("victim", 4.0), ("flooder", 10.0), ("third", 10.0)):
        traffic.poisson("interactive", tenant, rate, 16.0, (64, 512), (64, 192))
    for _ in range(size):
        traffic.task(
            "interactive", "flooder", traffic.random.randint(64, 512), traffic.random.randint(64, 192), 4.0
        )
    return traffic.made


def visits(size: int) -> list[Task]:
    """A flooder sends ``size`` requests at once; a visitor asks for little, for one second of every eight."""
    traffic = Traffic()
    for _ in range(size):
        prompt, output = traffic.random.randint(64, 512), traffic.random.randint(64, 192)
        traffic.task("interactive", "flooder", prompt, output, 0.0)
    for visit in range(5):
        traffic.poisson("interactive", "visitor", 4.0, 1.0, (64, 512), (64, 192), begin=1.0 + 8.0 * visit)
    return traffic.made


def backlog(weights: list[float], each: int = 400) -> list[Task]:
    """Tenants with more to do than can be done; each asks in its own sizes."""
    traffic = Traffic()
    for i, weight in enumerate(weights):
        for _ in range(int(each * max(1.0, weight))):
            prompt, output = 32 + 61 * i, max(16, 200 - 17 * i)
            traffic.task("interactive", f"t{i}", prompt, output, 0.0, weight=weight)
    return traffic.made


def heavy_tail(rate: float = 75.0, seconds: float = 12.0) -> list[Task]:
    """One tenant, one band; most answers are short, a few are very long: what MLFQ is made for."""
    traffic, at = Traffic(), 0.0
    while (at := at + traffic.random.expovariate(rate)) < seconds:
        output = min(2000, int(20 * traffic.random.paretovariate(1.0)))
        traffic.task("interactive", "all", traffic.random.randint(32, 256), output, at)
    return traffic.made

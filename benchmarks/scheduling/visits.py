"""A flood of interactive work beside a tenant that comes for a second every eight: what each pays."""

from __future__ import annotations

from typing import Any

from benchmarks.scheduling import traces
from benchmarks.scheduling.policies import Fcfs
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.simulator import Simulator

Figures = dict[str, Any]
POLICIES = {
    "LLM OS": lambda simulator, steps: Core(simulator, steps),
    "LLM OS, share 1.0": lambda simulator, steps: Core(simulator, steps, share=1.0),
    "FCFS": lambda simulator, steps: Core(simulator, steps, order=Fcfs()),
}


def visits() -> Figures:
    """The visitor's p99, and when the flood is done."""
    found: Figures = {}
    for policy, make_core in POLICIES.items():
        for size in (0, 2000):
            tasks = traces.visits(size)
            sim = Simulator(traces.model(), traces.STEP, make_core=make_core)
            sim.submit(tasks)
            sim.run()
            mine = [sim.records[task.id] for task in tasks if task.tenant == "visitor"]
            flood = [sim.records[task.id] for task in tasks if task.tenant == "flooder"]
            found.setdefault(policy, {})[f"flood_{size}"] = {
                "first_token_p99_ms": _p99([record.first_token for record in mine]),
                "total_p99_ms": _p99([record.ended - record.task.arrived for record in mine]),
                "flood_done_s": round(max((record.ended for record in flood), default=0.0), 1),
            }
    return found


def _p99(values: list[float]) -> float:
    return round(1e3 * sorted(values)[int(0.99 * len(values))], 1)

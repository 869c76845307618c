"""What is compared: each experiment returns its figures, for every policy it is about."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.scheduling import traces
from benchmarks.scheduling.mixes import mixes
from benchmarks.scheduling.models import pool
from benchmarks.scheduling.policies import POLICIES, core
from benchmarks.scheduling.tiers import conversations, displaced
from benchmarks.scheduling.visits import visits
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.prefixes import chain
from llmos.services.scheduler.queue import OUTPUT_CHARGE
from llmos.services.scheduler.seating import Seating
from llmos.services.scheduler.simulator import Record, Simulator
from llmos.services.scheduler.task import Task

Figures = dict[str, Any]
OURS = "LLM OS"
WARM_UP = 2.0  # seconds in which an empty device fills


def run(policy: str, tasks: list[Task], until: float = float("inf"), hosts: int = 1) -> Simulator:
    """A policy on a trace, to its end or to a time."""
    sim = Simulator(traces.model(), traces.STEP, make_core=core(policy), hosts=hosts)
    sim.submit(tasks)
    sim.run(until)
    return sim


def bands() -> Figures:
    """Time to first token by band beside batch work in all slots, and what that costs the batch."""
    found: Figures = {}
    urgent = [task for task in traces.saturated() if task.rank < 2]
    idle = run(OURS, urgent)
    found["idle"] = {band: first_tokens(idle, urgent, band) for band in BANDS[:2]}
    batch = [task for task in traces.saturated() if task.rank == 2]
    alone = run("FCFS", batch)
    alone_seconds = max(record.ended for record in alone.records.values())
    for policy in POLICIES:
        tasks = traces.saturated()
        sim = run(policy, tasks)
        deadlines = [sim.records[task.id] for task in tasks if task.deadline]
        end = max(record.ended for record in sim.records.values())
        found[policy] = {band: first_tokens(sim, tasks, band) for band in BANDS} | {
            "deadlines_met": share(record.in_time for record in deadlines),
            "refused": sum(record.error is not None for record in deadlines),
            "all_done_s": round(end, 2),
            "displaced": sim.core.seating.displaced,
        }
    found["batch_alone_done_s"] = round(alone_seconds, 2)
    return found


def overload() -> Figures:
    """Tokens of tasks that met their deadline, from 0.5 to 3 times what the device can do; counted are those
    made from two seconds after the first arrival to the last one, so that neither the filling of an empty
    device nor its emptying counts for any policy."""
    capacity = 53.0  # tasks a second: where goodput stops to rise
    loads = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    found: Figures = {"loads": list(loads)}
    for policy in POLICIES:
        rows = []
        for load in loads:
            tasks = traces.realtime(load * capacity, int(1800 * max(1.0, load)))
            sim = run(policy, tasks, until=tasks[-1].arrived + 12)
            records = [sim.records[task.id] for task in tasks]
            admitted = [record for record in records if record.error is None]
            end = tasks[-1].arrived
            good = sum(WARM_UP <= at < end for r in records if r.in_time for at in r.times)
            offered = sum(task.limit - task.prompt for task in tasks)
            rows.append(
                {
                    "offered_tokens_per_s": round(offered / end),
                    "goodput_tokens_per_s": round(good / (end - WARM_UP)),
                    "tasks": len(tasks),
                    "admitted": len(admitted),
                    "admitted_late": sum(not record.in_time for record in admitted),
                }
            )
        found[policy] = rows
    return found


def fairness() -> Figures:
    """Largest difference in weighted service between tenants, and the bound of the VTC paper."""
    found: Figures = {}
    cases = {"two": [1.0, 1.0], "two_weighted": [1.0, 3.0], "ten": [1.0] * 8 + [2.0, 4.0]}
    for (name, weights), policy in itertools.product(cases.items(), (OURS, "FCFS")):
        tasks = traces.backlog(weights)
        sim = Simulator(traces.model(), traces.STEP, make_core=core(policy))
        sim.submit(tasks)
        worst, line = 0.0, list[list[float]]()
        while all(waiting(sim, f"t{i}") for i in range(len(weights))) and sim.now < 60:
            sim.run(until=sim.now + 0.02)
            sim.now = max(sim.now, 0.02)
            served = [sim.core.counters.served[f"t{i}"] for i in range(len(weights))]
            worst = max(worst, max(served) - min(served))
            line.append([round(sim.now, 3), *(round(s) for s in served)])
            sim.at(sim.now + 0.02, lambda: None)
        # 2 max(w_p L_input, w_q M), M the tokens of a full batch; weights divide the service.
        longest = max(task.limit - task.prompt for task in tasks)
        bound = 2 * max(max(t.prompt for t in tasks), OUTPUT_CHARGE * traces.SLOTS * longest) / min(weights)
        found.setdefault(name, {})[policy] = {"worst_difference": round(worst), "bound": round(bound)}
        if name == "two_weighted":
            found[name][policy]["service"] = line[:: max(1, len(line) // 100)]
    return found


def waiting(sim: Simulator, tenant: str) -> bool:
    return sim.now < 0.05 or sim.core.waiting_of(tenant) > 0


def flood() -> Figures:
    """A tenant's p99 while another sends 1,000 requests at once."""
    found: Figures = {}
    for policy, saturated in itertools.product(POLICIES, (False, True)):
        row = {}
        for size in (0, 1000):
            tasks = traces.flood(size, saturated)
            sim = run(policy, tasks)
            mine = [sim.records[t.id] for t in tasks if t.tenant == "victim" and 4.0 <= t.arrived < 14.0]
            row[f"flood_{size}"] = {
                "first_token_p99_ms": quantile([r.first_token for r in mine], 0.99),
                "total_p99_ms": quantile([r.ended - r.task.arrived for r in mine], 0.99),
            }
        before, after = row["flood_0"], row["flood_1000"]
        found.setdefault("saturated before" if saturated else "0.8 before", {})[policy] = row | {
            "total_p99_ratio": round(after["total_p99_ms"] / before["total_p99_ms"], 3),
            "first_token_p99_ratio": round(after["first_token_p99_ms"] / before["first_token_p99_ms"], 3),
        }
    return found


def heavy_tail() -> Figures:
    """One tenant, one band, answers of very different length: to serve the short first, others are better."""
    found: Figures = {}
    for policy in POLICIES:
        tasks = traces.heavy_tail()
        sim = run(policy, tasks)
        records = [sim.records[task.id] for task in tasks]
        each = [(r.ended - r.task.arrived) / r.task.produced for r in records]
        found[policy] = {
            "first_token_p50_ms": quantile([r.first_token for r in records], 0.5),
            "first_token_p99_ms": quantile([r.first_token for r in records], 0.99),
            "mean_ms_per_token": round(1e3 * sum(each) / len(each), 2),
            "longest_total_s": round(max(r.ended - r.task.arrived for r in records), 2),
            "displaced": sim.core.seating.displaced,
        }
    return found


def starvation() -> Figures:
    """The longest that a batch task waits while interactive work alone is more than the device can do."""
    found: Figures = {}
    for policy in POLICIES:
        traffic = traces.Traffic()
        traffic.poisson("interactive", "chat", 90.0, 60.0, (64, 512), (64, 192))
        for i in range(20):
            traffic.task("batch", "patient", 100, 100, 1.0 + 0.1 * i)
        sim = run(policy, traffic.made, until=61.0)
        waits = [
            (sim.records[t.id].times or [61.0])[0] - t.arrived for t in traffic.made if t.tenant == "patient"
        ]
        found[policy] = {
            "first_wait_s": round(min(waits), 1),
            "worst_wait_s": round(max(waits), 1),
            "never_served": sum(not sim.records[t.id].times for t in traffic.made if t.tenant == "patient"),
        }
    return found


def prefixes() -> Figures:
    """Sixteen tasks with a common prefix of 2,000 tokens at once; and what looking for one costs."""
    found: Figures = {}
    for policy in (OURS, "FCFS"):
        traffic = traces.Traffic()
        common = traffic.task("interactive", "a", 2000, 1, 0.0).tokens
        for task in (made := [traffic.task("interactive", "a", 2016, 32, 0.0) for _ in range(16)]):
            task.tokens[:2000] = common
        sim = run(policy, made)
        found[policy] = {
            "prompt_tokens_computed": sum(task.prompt - max(0, task.first_cached) for task in made),
            "first_token_p99_ms": quantile([sim.records[task.id].first_token for task in made], 0.99),
            "all_done_ms": round(1e3 * max(record.ended for record in sim.records.values()), 1),
        }
    return found


def prefix_cost() -> Figures:
    """Own time of prompts that share nothing: to name and look up their prefixes, which a first token waits
    for, and to enter and drop them, which it does not; beside the device's time to compute them."""
    found: Figures = {}
    for length in (128, 2048):
        memory = Simulator(traces.model(), traces.STEP).memory
        rng, count = random.Random(1), 200
        before, behind = 0.0, 0.0
        for id in range(count):
            tokens = [rng.randrange(256) for _ in range(length)]
            begun = time.thread_time()
            chain("a", tokens, 16)
            memory.reserve(id, "a", tokens, 0, 0)
            looked = time.thread_time()
            memory.commit([(id, [], length)])
            memory.free([id])
            before, behind = before + looked - begun, behind + time.thread_time() - looked
        device = count * (traces.STEP.base + traces.STEP.prefill * length)
        found[f"prompt_{length}"] = {
            "before_us": round(1e6 * before / count, 1),
            "before_share": round(before / device, 4),
            "behind_us": round(1e6 * behind / count, 1),
            "behind_share": round(behind / device, 4),
        }
    return found


def hosts() -> Figures:
    """Two hosts of one model: prefix hits and balance."""
    traffic = traces.Traffic()
    topics = [[traffic.random.randrange(256) for _ in range(1024)] for _ in range(12)]
    traffic.poisson("interactive", "a", 25.0, 10.0, (1100, 1300), (64, 192))
    for task in traffic.made:
        task.tokens[:1024] = traffic.random.choice(topics)
    sim = run(OURS, traffic.made, hosts=2)
    tokens = [host.tokens for host in sim.hosts]
    cached = sum(max(0, task.first_cached) for task in traffic.made)
    return {
        "tokens_by_host": tokens,
        "prompt_tokens_cached": round(cached / sum(task.prompt for task in traffic.made), 3),
        "at_most_cached": round(1024 * len(traffic.made) / sum(task.prompt for task in traffic.made), 3),
    }


def cost() -> Figures:
    """Processor time for a decision with 256 running and 10,000 waiting tasks: who runs is a flood that gives
    way to those who wait, or all were promised their deadlines."""
    found: Figures = {}
    for tenants, promised in ((1, False), (50, False), (10_000, False), (50, True)):
        sim = Simulator(traces.model(256, 1 << 16), traces.STEP)
        traffic = traces.Traffic()
        for i in range(256):
            if promised:
                traffic.task("realtime", f"r{i % 50}", 16, 1000, 0.1 + 1e-3 * i, slack=30)
            else:
                traffic.task("interactive", f"r{i % max(1, tenants // 40)}", 16, 4000, 0.0)
        for i in range(10_000):
            traffic.task(("interactive", "batch")[i % 2], f"t{i % tenants}", 16, 64, 0.5)
        sim.submit(traffic.made)
        sim.run(until=1.0)
        spent = list[float]()
        _timed(sim.core.seating, "admit", spent)
        _timed(sim.core, "run", spent)
        gc.disable()  # as the scheduler process does it
        sim.run(until=3.0)
        gc.enable()
        spent.sort()
        found["promised" if promised else f"tenants_{tenants}"] = {
            "p50_ms": quantile(spent, 0.5), "p99_ms": quantile(spent, 0.99), "max_ms": quantile(spent, 1.0)
        }  # fmt: skip
    return found


def _timed(part: Core | Seating, name: str, spent: list[float]) -> None:
    function: Callable[..., None] = getattr(part, name)

    def timed(*arguments: Any) -> None:
        begun = time.thread_time()
        function(*arguments)
        spent.append(time.thread_time() - begun)

    setattr(part, name, timed)


def first_tokens(sim: Simulator, tasks: list[Task], band: str) -> dict[str, float]:
    records: list[Record] = [sim.records[task.id] for task in tasks if task.band == band]
    times = [record.first_token for record in records if record.times]
    return {"p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99)}


def quantile(values: list[float], share: float) -> float:
    """In milliseconds, nearest rank."""
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else 0.0


def share(values: Any) -> float:
    flags = [bool(value) for value in values]
    return round(sum(flags) / len(flags), 3) if flags else 1.0


EXPERIMENTS: dict[str, Callable[[], Figures]] = {
    each.__name__: each
    for each in (
        bands,
        overload,
        fairness,
        flood,
        visits,
        heavy_tail,
        starvation,
        prefixes,
        prefix_cost,
        hosts,
        cost,
        conversations,
        displaced,
        pool,
        mixes,
    )
}

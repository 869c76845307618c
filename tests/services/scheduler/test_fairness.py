"""Fairness between tenants: service within the bound of virtual token counters, at all times."""

from __future__ import annotations

import pytest

from llmos.services.scheduler.queue import AGED_EVERY, AGING_SECONDS, Counters, TaskQueue
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Task
from tests.services.scheduler.traffic import model, task

SLOTS = 16


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [1.0] * 8 + [2.0, 4.0]])
def test_backlogged_tenants_are_served_in_proportion_at_all_times(weights: list[float]) -> None:
    sim = Simulator(model(slots=SLOTS, pages=4000, page_tokens=16, chunk_tokens=512), StepTime())
    made: list[Task] = []
    for i, weight in enumerate(weights):
        for _ in range(int(60 * weight)):
            made.append(task(len(made), [i] * (10 + 13 * i), 80 - 7 * i, tenant=f"t{i}"))
            made[-1].weight = weight
    sim.submit(made)
    longest, prompt = max(t.limit - t.prompt for t in made), max(t.prompt for t in made)
    bound = 2 * max(prompt, 2 * SLOTS * longest)
    checks, now = 0, 0.01
    sim.run(until=now)
    while all(sim.core.waiting_of(f"t{i}") for i in range(len(weights))):
        served = [sim.core.counters.served[f"t{i}"] for i in range(len(weights))]
        assert max(served) - min(served) <= bound
        checks, now = checks + 1, now + 0.01
        sim.run(until=now)
    assert checks > 30


def test_a_tenant_that_comes_while_nobody_is_active_owes_as_much_as_the_last_who_left() -> None:
    counters = Counters()
    first = task(1, [1], 1, tenant="first")
    counters.enter("first")
    counters.charge(first, 1000, 0)
    counters.leave("first")
    counters.enter("second")
    counters.enter("first")
    assert counters.served["second"] == counters.served["first"] == 1000


def test_the_queue_serves_the_smallest_counter_whatever_happens_in_between() -> None:
    counters = Counters()
    queue = TaskQueue(counters)
    for i in range(30):
        one = task(i, [1], 1, tenant=f"t{i % 3}")
        counters.enter(one.tenant)
        queue.push(one)
    order = []
    for _ in range(30):
        first = queue.peek(0.0)
        assert first is not None
        queue.take(first)
        counters.charge(first, {"t0": 1, "t1": 2, "t2": 4}[first.tenant], 0)
        order.append(first.tenant)
    assert [order[:14].count(t) for t in ("t0", "t1", "t2")] == [8, 4, 2]
    assert queue.peek(0.0) is None
    assert not len(queue)


def test_a_refund_brings_a_turn_forward() -> None:
    counters = Counters()
    queue = TaskQueue(counters)
    a, b = task(1, [1], 1, tenant="a"), task(2, [1], 1, tenant="b")
    for one in (a, b):
        counters.enter(one.tenant)
        queue.push(one)
    counters.charge(a, 10, 0)
    counters.charge(b, 5, 0)
    assert queue.peek(0.0) is b
    counters.refund(a, 10)
    queue.refunded("a")
    assert queue.peek(0.0) is a


def test_a_batch_task_that_waited_gets_every_eighth_interactive_turn_and_no_more() -> None:
    counters = Counters()
    queue = TaskQueue(counters)
    for i in range(40):
        one = task(i, [1], 1, tenant="chat", band=1 if i < 30 else 2)
        counters.enter("chat")
        queue.push(one)
    now, taken = AGING_SECONDS + 1, []
    for _ in range(24):
        next_one = queue.peek(now)
        assert next_one is not None
        queue.take(next_one, now)
        taken.append(next_one.rank)
    assert taken == ([1] * (AGED_EVERY - 1) + [2]) * 3


def test_no_one_is_displaced_for_a_batch_task_that_waited() -> None:
    queue = TaskQueue(Counters())
    for i in range(20):
        queue.push(task(i, [1], 1, tenant=f"t{i}", band=1 if i < 18 else 2))
    for _ in range(10):
        one = queue.peek(100.0, vacant=False)
        assert one is not None
        assert one.rank == 1
        queue.take(one, 100.0)

"""Deadlines: what is promised is kept, what cannot be kept is refused at once, and overload costs nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmos.ipc.errors import NoMemory, TimedOut
from llmos.services.scheduler.admission import all_in_time, does_no_harm, earliest
from llmos.services.scheduler.forecast import Job, Machine, finish_times
from llmos.services.scheduler.simulator import Jitter, Simulator, StepTime
from llmos.services.scheduler.task import Task
from tests.services.scheduler.traffic import expected, model, task

EVEN, KINK, NO_JITTER = StepTime(), StepTime(kink=220), Jitter()
WARM_UP = 2.0  # seconds
UNEVEN = Jitter(spread=0.1, late=5e-4, stalls=100, stall=8e-3)
DEVICES = {
    "even": (EVEN, NO_JITTER),
    "kink": (KINK, NO_JITTER),
    "jitter": (EVEN, UNEVEN),
    "kink and jitter": (KINK, UNEVEN),
}
MACHINE = Machine(
    step=lambda rows, context, prefilled: 0.01 + 0.0001 * prefilled, chunk=lambda *_: 100, slots=2, pages=100
)


def job(id: int, deadline: float, prefill: int = 0, decode: int = 10, pages: int = 1) -> Job:
    return Job(id, deadline, prefill, decode, 100, pages)


def test_jobs_in_the_batch_decode_together_and_the_others_come_after() -> None:
    done = finish_times([job(1, 1.0), job(2, 2.0, decode=20), job(3, 3.0)], MACHINE, 0.0)
    assert done == pytest.approx({1: 0.1, 2: 0.2, 3: 0.2})


def test_prompts_are_prefilled_by_deadline_one_after_the_other() -> None:
    done = finish_times([job(1, 2.0, prefill=200, decode=0), job(2, 1.0, prefill=200, decode=0)], MACHINE, 0)
    assert done == pytest.approx({2: 0.04, 1: 0.08})


def test_a_job_waits_for_pages() -> None:
    done = finish_times([job(1, 1.0, pages=60), job(2, 2.0, pages=60)], MACHINE, 0.0)
    assert done == pytest.approx({1: 0.1, 2: 0.2})


def test_a_slot_that_is_given_up_is_taken_some_steps_later_and_the_others_go_on_meanwhile() -> None:
    slow = replace(MACHINE, turnover=3)
    done = finish_times([job(1, 1.0), job(2, 2.0, decode=20), job(3, 3.0)], slow, 0.0)
    assert done == pytest.approx({1: 0.1, 2: 0.2, 3: 0.23})


def test_one_whom_the_forecast_sees_late_is_no_reason_to_refuse_who_does_not_hold_it_up() -> None:
    late = job(1, 0.09)
    assert does_no_harm(job(2, 1.0), [late], MACHINE, 0.0)
    assert not does_no_harm(job(2, 1.0, prefill=200), [late], MACHINE, 0.0), "its prompt is in the way"
    assert not does_no_harm(job(2, 0.05), [job(1, 1.0)], MACHINE, 0.0), "it would be late itself"


def test_the_end_is_as_late_as_so_many_steps_may_be() -> None:
    stretched = replace(MACHINE, stretch=[1.5] * 4 + [1.1] * 28)
    done = finish_times([job(1, 1.0, decode=7), job(2, 2.0, decode=20)], stretched, 1.0)
    assert done == pytest.approx({1: 1.0 + 0.07 * 1.5, 2: 1.0 + 0.2 * 1.1})


def test_who_may_be_later_must_neither_be_late_nor_in_the_way() -> None:
    pace = lambda rows, context, seconds: 200 if seconds > 0.02 else 0  # noqa: E731
    machine = replace(MACHINE, chunk=pace)
    first = job(1, 0.15, prefill=100)
    second = job(2, 0.2, prefill=100)._replace(later=True)
    # In the first step with the other it would be done after 0.13 s; later it waits for the other's end.
    assert finish_times([first, second], machine, 0.0, together=True)[2] == pytest.approx(0.13)
    assert finish_times([first, second], machine, 0.0)[2] == pytest.approx(0.24)
    assert not does_no_harm(second, [first], machine, 0.0)
    assert does_no_harm(second._replace(deadline=0.3), [first], machine, 0.0)
    assert not does_no_harm(second._replace(deadline=0.3), [first._replace(deadline=0.125)], machine, 0.0)


def test_the_earliest_deadline_can_be_kept_and_little_less_cannot() -> None:
    admitted = [job(i, 0.1 * (i + 1)) for i in range(4)]
    assert all_in_time(admitted[:2], MACHINE, 0.0)
    found = earliest(job(9, 0.0), admitted, MACHINE, 0.0)
    assert all_in_time([*admitted, job(9, found)], MACHINE, 0.0)
    assert not all_in_time([*admitted, job(9, found - 0.1)], MACHINE, 0.0)


def realtime(count: int, rate: float, seed: int = 1) -> list[Task]:
    """Poisson arrivals with deadlines of 3 to 10 times what a task takes on an idle device."""
    rng, made, now = random.Random(seed), list[Task](), 0.0
    for id in range(count):
        now += rng.expovariate(rate)
        prompt, output = rng.randint(64, 1024), rng.randint(16, 128)
        tokens = [rng.randrange(256) for _ in range(prompt)]
        one = task(id, tokens, output, now, band=0, tenant=f"t{id % 5}")
        one.deadline = now + rng.uniform(3, 10) * (0.006 * output + 2.1e-5 * prompt)
        made.append(one)
    return made


def served(
    count: int, rate: float, batch: int = 0, device: StepTime = EVEN, jitter: Jitter = NO_JITTER
) -> tuple[Simulator, list[Task], float]:
    """The simulator after the traffic, its tasks, and the tokens made in a second for those who are in time,
    from when the device is full until nobody comes any more."""
    sim = Simulator(model(slots=64, pages=8192, page_tokens=16, chunk_tokens=2048), device, jitter=jitter)
    tasks = realtime(count, rate)
    sim.submit([*tasks, *(task(10**6 + i, [i % 256] * 300, 400, band=2) for i in range(batch))])
    sim.run(until=tasks[-1].arrived + 10)
    records, end = [sim.records[t.id] for t in tasks], tasks[-1].arrived
    good = sum(WARM_UP <= at < end for record in records if record.in_time for at in record.times)
    return sim, tasks, good / (end - WARM_UP)


@pytest.mark.parametrize("batch", [0, 200])
@pytest.mark.parametrize("device", DEVICES)
def test_no_deadline_among_the_admitted_is_missed(batch: int, device: str) -> None:
    sim, tasks, _ = served(400, 90.0, batch, *DEVICES[device])
    check_promises(sim, tasks)
    assert sum(sim.records[t.id].error is not None for t in tasks) > 20


def check_promises(sim: Simulator, tasks: list[Task]) -> None:
    for one in tasks:
        record = sim.records[one.id]
        if record.error is None:
            assert record.in_time, f"task {one.id} is {record.ended - one.deadline:.4f} s late"
            assert one.tokens == expected(one.tokens[: one.prompt], one.limit - one.prompt)
        else:
            assert isinstance(record.error, TimedOut | NoMemory)
            assert record.ended == one.arrived, "a refusal comes at once"
            earliest = record.error.details["earliest"]
            assert isinstance(earliest, float)
            assert earliest > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", DEVICES)
def test_no_deadline_among_10_000_is_missed(device: str) -> None:
    for rate, batch in ((45.0, 400), (60.0, 0), (120.0, 400), (180.0, 0)):
        sim, tasks, _ = served(2_500, rate, batch, *DEVICES[device])
        check_promises(sim, tasks)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_goodput_stays_near_its_peak_whatever_is_asked() -> None:
    goodput = {rate: served(1_500, rate)[2] for rate in (60.0, 90.0, 120.0, 160.0)}
    assert min(goodput.values()) >= 0.94 * max(goodput.values())


def test_a_deadline_that_the_refusal_named_is_accepted() -> None:
    sim = Simulator(model(slots=2, pages=400, page_tokens=4, chunk_tokens=64), StepTime())
    sim.submit([task(i, [i] * 30, 60, 0.0, band=0) for i in range(2)])
    for i in range(2, 6):
        sim.submit([due(task(i, [i] * 30, 60, 0.3, band=0), 3.0)])
    hasty = due(task(50, [1] * 30, 200, 0.31, band=0), 0.2)
    sim.submit([hasty])
    sim.run(until=0.311)
    error = sim.records[50].error
    assert isinstance(error, TimedOut)
    sim.submit([due(task(51, [1] * 30, 200, 0.312, band=0), float(str(error.details["earliest"])) + 0.01)])
    sim.run()
    assert sim.records[51].in_time
    assert all(sim.records[i].in_time for i in range(2, 6))


@pytest.mark.parametrize("after", [0.001, 0.003, 0.006, 0.01, 0.02, 0.05, 0.11])
def test_a_tight_promise_that_is_being_kept_refuses_nobody_who_has_time(after: float) -> None:
    sim = Simulator(model(slots=8, pages=400, page_tokens=4, chunk_tokens=64), StepTime())
    sim.submit([task(0, [1] * 30, 60, 0.0, band=0), due(task(1, [1] * 30, 30, 1.0, band=0), 0.01)])
    sim.run(until=1.001)
    error = sim.records[1].error
    assert isinstance(error, TimedOut)
    tight = due(task(2, [2] * 30, 30, 1.01, band=0), float(str(error.details["earliest"])) + 1e-3)
    sim.submit([tight, due(task(3, [3] * 30, 2, 1.01 + after, band=0), 3.0)])
    sim.run()
    assert sim.records[2].in_time
    assert sim.records[3].in_time


def test_pages_that_are_promised_to_others_are_refused_as_such() -> None:
    sim = Simulator(model(slots=8, pages=64, page_tokens=4, chunk_tokens=64), StepTime())
    sim.submit([task(0, [0] * 8, 30, 0.0, band=0)])
    sim.submit(
        [due(task(1, [1] * 100, 100, 1.0, band=0), 0.6), due(task(2, [2] * 100, 80, 1.01, band=0), 0.7)]
    )
    sim.run()
    assert sim.records[1].in_time
    assert isinstance(sim.records[2].error, NoMemory)


def test_an_earlier_deadline_takes_the_slot_of_a_later_one() -> None:
    sim = Simulator(model(slots=1, pages=200), StepTime())
    late, soon = due(task(1, [1] * 4, 100, 0.0, band=0), 10.0), due(task(2, [2] * 4, 10, 0.1, band=0), 0.4)
    never = task(3, [3] * 4, 10, 0.0, band=0)
    sim.submit([late, soon, never])
    sim.run()
    assert sim.records[1].in_time
    assert sim.records[2].in_time
    assert late.displaced
    assert sim.records[3].ended > sim.records[1].ended, "without a deadline it comes last"


def due(task: Task, seconds: float) -> Task:
    task.deadline = task.arrived + seconds
    return task

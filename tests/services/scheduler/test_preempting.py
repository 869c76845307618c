"""Quanta are taken back: what follows comes at once, and whoever takes back however often, work gets done."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.sdk.messages import Chunk, LoadedModel, Quantum, QuantumDone, Step
from llmos.services.scheduler.flight import InFlight
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place, Task
from tests.services.scheduler.traffic import check_all, model
from tests.services.scheduler.traffic import task as task_of

TIME = StepTime(base=1e-3, row=0.0, context=0.0, prefill=1e-5)
LATENCY = 2.5e-4


def task(id: int, name: str, prompt: int, count: int, arrived: float = 0.0, band: int = 1) -> Task:
    made = task_of(id, [(id * 7 + i) % 256 for i in range(prompt)], count, arrived, band, tenant=name)
    made.model = name
    return made


class Watched(Simulator):
    """Several models on one device. Asserts that between two times that a host's quanta are taken back it
    has a step, or one of what was taken back is on the device."""

    def __init__(self, models: int, pool: bool = False, pages: int = 64, **options: object) -> None:
        self.preempts = 0
        self._before: dict[str, tuple[int, int]] = {}
        first, *others = [_model(name, pool, pages) for name in "abc"[:models]]
        beside = [(each, TIME) for each in others]
        super().__init__(first, TIME, latency=LATENCY, beside=beside, **options)  # type: ignore[arg-type]

    def preempt(self, host: Host, quantum: int) -> None:
        steps, last = self._before.get(host.arena, (-1, 0))
        on_device = any(flight.to_come > 0 for flight in host.flight if flight.quantum.id <= last)
        assert host.steps > steps or on_device, "taken back again before any of it was done"
        self._before[host.arena] = host.steps, quantum
        self.preempts += 1
        super().preempt(host, quantum)

    def nag(self, every: float, until: float) -> None:
        """Someone wants everything taken back all the time."""

        def once() -> None:
            for host in self.hosts:
                self.core.take_back(host)
            if self.now < until:
                self.at(self.now + every, once)

        self.at(0.0, once)

    def finish_all(self, made: list[Task], within: float) -> None:
        """All tasks get their tokens, in so many seconds for each step that was done."""
        prompts = {each.id: list(each.tokens) for each in made}
        self.submit(made)
        self.run()
        check_all(self, made, prompts)
        steps = sum(host.steps for host in self.hosts)
        assert max(self.records[each.id].ended for each in made) <= 1.0 + steps * within


def _model(name: str, pool: bool, pages: int) -> LoadedModel:
    alone = msgspec.structs.replace(model(slots=4, pages=pages), model=name)
    if not pool:
        return alone
    return msgspec.structs.replace(alone, pool="p", slabs=pages // 4, slab_pages=4, slab_bytes=12)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_work_is_done_however_often_it_is_taken_back(models: int, tells: bool) -> None:
    """A step takes four messages: all could be taken back before any of it has its turn."""
    sim = Watched(models, tells=tells)
    sim.nag(LATENCY, 2.0)
    made = [task(i, "abc"[i % models], 12, 40) for i in range(8 * models)]
    sim.finish_all(made, within=TIME.base + 8 * LATENCY)
    assert sim.preempts > 40


pauses = st.sampled_from([LATENCY, 4 * LATENCY, 20 * LATENCY, 1.0])  # between two wishes to take all back
requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 30),  # output
        st.floats(0, 0.2),  # arrival
        st.integers(0, 2),  # band
        st.integers(0, 2),  # model
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(requests, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 3), pauses)
def test_any_traffic_on_one_device_ends_with_the_right_tokens(
    traffic: list[tuple[int, int, float, int, int]],
    models: int,
    pool: bool,
    tells: bool,
    burst: int,
    every: float,
) -> None:
    sim = Watched(models, pool, pages=60, tells=tells, burst=burst)
    sim.nag(every, 1.0)
    made = [
        task(i, "abc"[which % models], prompt, count, at, band)
        for i, (prompt, count, at, band, which) in enumerate(traffic)
    ]
    sim.finish_all(made, within=0.05)


def busy_share(tells: bool) -> tuple[float, float]:
    """Urgent tasks beside a full batch: the part of the time in which the device works, and the longest wait
    for a first token."""
    sim = Watched(1, pages=600, tells=tells)
    urgent = [task(100 + i, "a", 12, 1, 0.1 + 0.0237 * i) for i in range(55)]
    sim.submit([*[task(i, "a", 12, 400, band=2) for i in range(16)], *urgent])
    sim.run(until=1.5)
    assert sim.preempts > 40
    return sim.busy / sim.now, max(sim.records[each.id].first_token for each in urgent)


def test_a_device_that_tells_how_far_it_came_is_not_left_idle() -> None:
    telling, waited_for = busy_share(tells=True), busy_share(tells=False)
    assert telling[0] > 0.995 > waited_for[0]
    assert telling[1] < waited_for[1]


def test_who_comes_too_soon_is_served_after_the_next_step() -> None:
    sim, at = Watched(2), 0.05
    sim.submit([task(i, "ab"[i % 2], 12, 200) for i in range(4)])
    sim.run(until=at)
    host = sim.hosts[1]
    while host.draining or not host.stalled:
        sim.core.take_back(host)
        at += 1e-4
        sim.run(until=at)
        assert at < 0.2
    before, steps = sim.preempts, host.steps
    sim.core.take_back(host)
    assert sim.preempts == before
    while host.steps == steps:
        at += 1e-4
        sim.run(until=at)
    assert sim.preempts == before + 1


@pytest.fixture
def host() -> Host:
    """One task decodes, the other has 30 prompt tokens to go; 16 fit in a step."""
    host = Host("d", model(slots=2), ready=True)
    for slot, prompt in enumerate((4, 30)):
        one = task(slot, "m", prompt, 40)
        one.slot, one.place, one.base, one.pages = slot, Place.RUNNING, prompt, list(range(20))
        host.slots[slot] = one
    decoding = host.slots[0]
    assert decoding is not None
    decoding.prefilled = decoding.computed = decoding.planned = 4
    return host


def send(host: Host, id: int, steps: int, *chunks: Chunk) -> None:
    host.sent(Quantum(id=id, model="m", steps=steps, chunks=list(chunks), decode=[0]))


def step(host: Host, quantum: int, index: int) -> None:
    host.apply(Step(quantum, index, [], [], [], 1000), 0.0)


def test_who_says_nothing_is_waited_for(host: Host) -> None:
    send(host, 1, 8)
    host.draining = host.stalled = True
    host.cut({})
    assert (host.draining, host.can_compose) == (True, False)
    host.done(QuantumDone(1, 0, True))
    assert host.can_compose
    send(host, 2, 8)
    assert not host.can_take_back, "nothing was done since"
    step(host, 2, 0)
    assert host.can_take_back


def test_what_is_on_the_device_may_be_followed_by_another_preempt(host: Host) -> None:
    send(host, 1, 8)
    step(host, 1, 0)
    host.draining = host.stalled = True
    host.cut({1: 2})
    assert (host.can_compose, host.can_take_back) == (True, False)
    send(host, 2, 8)
    assert host.can_take_back
    host.draining = host.stalled = True
    step(host, 1, 1)
    host.cut({2: 0})
    send(host, 3, 8)
    assert host.can_take_back, "a step was done since"
    host.draining = host.stalled = True
    host.cut({3: 0})
    send(host, 4, 8)
    assert not host.can_take_back


def test_an_end_that_overtakes_the_answer_changes_nothing(host: Host) -> None:
    send(host, 1, 1)
    send(host, 2, 8)
    host.draining = host.stalled = True
    step(host, 1, 0)
    host.done(QuantumDone(1, 1, False))
    host.cut({1: 1, 2: 0})
    assert not host.draining
    host.done(QuantumDone(2, 0, True))
    send(host, 3, 8)
    host.cut({1: 1, 2: 0})
    assert [flight.to_come for flight in host.flight] == [8]


def test_prompts_and_tokens_that_were_taken_back_are_planned_again(host: Host) -> None:
    decoding, prompt = host.running
    send(host, 1, 2, Chunk(0, 1, 0, 16), Chunk(1, 1, 16, 14))
    send(host, 2, 8)
    decoding.planned, prompt.prefilled = 14, 30
    host.cut({1: 1, 2: 0})
    assert (decoding.planned, prompt.prefilled) == (5, 16)
    step(host, 1, 0)
    host.done(QuantumDone(1, 1, True))
    assert (prompt.computed, prompt.prefilled) == (16, 16)


def test_who_got_a_slot_anew_keeps_its_plan(host: Host) -> None:
    """What is in flight for its last stay gives it nothing."""
    send(host, 1, 2, Chunk(0, 1, 0, 16), Chunk(1, 1, 16, 14))
    again = host.running[1]
    again.stay += 1
    again.prefilled = 12
    again.computed = 12
    host.cut({1: 1})
    assert again.prefilled == 12


def test_a_prompt_that_is_complete_in_a_step_taken_back_gives_no_token() -> None:
    prompt = task(0, "m", 20, 40)
    prompt.slot, prompt.place, prompt.base = 0, Place.RUNNING, 20
    quantum = Quantum(id=1, model="m", steps=4, chunks=[Chunk(0, 0, 0, 16), Chunk(1, 0, 16, 4)], decode=[0])
    flight = InFlight(quantum, {0: (prompt, 0)})
    assert (flight.coming(prompt), flight.prefills(prompt)) == (3, 20)
    flight.end_after(2)
    assert (flight.coming(prompt), flight.prefills(prompt)) == (1, 20)
    flight.end_after(1)
    assert (flight.coming(prompt), flight.prefills(prompt), flight.to_come) == (0, 16, 1)

"""Work for encoders: cut into steps, shared between requests, fair, and sent again where a driver died."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.drivers.sdk.messages import EncodedStep, LoadedModel
from llmos.ipc.errors import Canceled, InvalidArgument, IOFailure, LLMOSError
from llmos.services.scheduler.encode_effects import check_texts
from llmos.services.scheduler.encoding import STEP_SECONDS, Batch, EncoderHost, Encoding, Job, length_class
from llmos.services.scheduler.messages import Encode
from llmos.services.scheduler.queue import AGING_SECONDS, Counters

MODEL = LoadedModel(
    model="e", family="null", parameters=0, weight_bytes=0, pages=0, page_tokens=0, page_bytes=0, slots=0,
    max_context=64, chunk_tokens=64, vocab_size=100, stop_tokens=[], attention="none", kind="encoder",
    width=1, token_types=2,
)  # fmt: skip


class World:
    """Hosts whose steps are finished by hand; one number for each text: its first token."""

    def __init__(self, hosts: int = 1) -> None:
        self.now = 0.0
        self.sent: list[tuple[EncoderHost, Batch]] = []
        self.rows_of: dict[int, dict[int, bytes]] = {}
        self.ended: dict[int, LLMOSError | None] = {}
        self.budget = STEP_SECONDS
        self.held: list[str] = []
        self.encoding = Encoding(self, Counters())
        self.hosts = [EncoderHost(f"d{i}", MODEL) for i in range(hosts)]
        for host in self.hosts:
            self.encoding.add_host(host, 0.0)
        self._ids = 0

    def seconds(self, driver: str) -> float:
        return self.budget

    def later(self, model: str) -> None:
        self.held.append(model)

    def encode(self, host: EncoderHost, batch: Batch) -> None:
        self.sent.append((host, batch))

    def rows(self, job: Job, indices: list[int], rows: bytes) -> None:
        assert len(rows) == 4 * len(indices)
        parts = self.rows_of.setdefault(job.id, {})
        for at, index in enumerate(indices):
            assert index not in parts
            parts[index] = rows[4 * at : 4 * at + 4]

    def finish(self, job: Job, error: LLMOSError | None, now: float) -> None:
        assert job.id not in self.ended
        self.ended[job.id] = error

    def submit(
        self, texts: list[list[int]], tenant: str = "a", band: Any = "interactive", **more: Any
    ) -> Job:
        self._ids += 1
        job = Job(self._ids, tenant, tenant, "e", band, texts, self.now, **more)
        self.encoding.submit(job, self.now)
        return job

    def step(self, seconds: float = 0.01, computed: int = 0) -> Batch:
        """The oldest step in flight is done."""
        host, batch = self.sent.pop(0)
        self.now += seconds
        texts = batch.message("e").texts
        data = b"".join(bytes([text[0], 0, 0, 0]) for text in texts)
        self.encoding.done(host, batch, EncodedStep(data, 1, round(seconds * 1e6), computed), self.now)
        return batch

    def run(self) -> list[Batch]:
        done = []
        while self.sent:
            done.append(self.step())
        return done

    def got(self, job: Job) -> list[int]:
        assert self.ended[job.id] is None
        return [self.rows_of[job.id][index][0] for index in range(len(job.texts))]


def texts(count: int, length: int = 16, first: int = 0) -> list[list[int]]:
    return [[(first + i) % 100] * length for i in range(count)]


def tenants(batch: Batch) -> set[str]:
    return {job.tenant for job, _ in batch.parts}


def test_lengths_are_counted_as_powers_of_two() -> None:
    assert [length_class(n) for n in (1, 16, 17, 32, 33, 512)] == [16, 16, 32, 32, 64, 512]


def test_a_large_request_is_cut_into_steps_two_of_which_are_in_flight() -> None:
    world = World()
    job = world.submit(texts(10) + texts(3, 40, first=50))
    assert len(world.sent) == 2
    steps = world.run()
    assert all(batch.padded <= MODEL.chunk_tokens for batch in steps)
    assert world.got(job) == [*range(10), 50, 51, 52]
    assert (world.encoding.jobs, world.encoding.finished) == ({}, 1)


def test_requests_share_a_step_if_their_texts_are_of_one_length() -> None:
    world = World()
    blocking = [world.submit(texts(1, 64)) for _ in range(2)]
    short = [world.submit(texts(1, first=i)) for i in (7, 8, 9)]
    world.step()
    assert len(world.sent[-1][1].parts) == 3
    world.run()
    assert [world.got(job) for job in short] == [[7], [8], [9]]
    assert [world.got(job) for job in blocking] == [[0], [0]]


def test_types_are_sent_where_any_text_has_them() -> None:
    world = World()
    world.submit(texts(1, 64)), world.submit(texts(1, 64))
    world.submit([[1, 2]])
    world.submit([[3, 4, 5]], types=[[0, 1, 1]])
    world.step()
    assert world.sent[-1][1].message("e").types == [[0, 0], [0, 1, 1]]
    assert world.sent[0][1].message("e").types == []


def test_interactive_goes_before_batch_and_shares_no_step_with_it() -> None:
    world = World()
    batch = world.submit(texts(40), band="batch")
    urgent = world.submit(texts(2), tenant="b")
    world.step()
    assert tenants(world.sent[-1][1]) == {"b"}
    world.run()
    assert world.got(urgent) == [0, 1]
    assert world.got(batch) == [*range(40)]


def test_batch_that_has_waited_long_gets_a_turn() -> None:
    world = World()
    waiting = world.submit(texts(1, 64), band="batch", tenant="b")
    world.submit(texts(2, 64), tenant="a")
    world.now = AGING_SECONDS + 1
    turns = 0
    late = world.submit(texts(1, 64), band="batch", tenant="c")
    late.arrived = 0.0
    while waiting.id not in world.ended or late.id not in world.ended:
        world.submit(texts(1, 64), tenant="a")
        world.step()
        turns += 1
        assert turns < 30


def test_realtime_goes_by_deadline() -> None:
    world = World()
    for _ in range(2):
        world.submit(texts(1, 64))
    late = world.submit(texts(1), band="realtime", deadline=9.0)
    soon = world.submit(texts(1, 32), band="realtime", deadline=5.0, tenant="b")
    world.step()
    world.step()
    assert [batch.parts[0][0] for _, batch in world.sent] == [soon, late]


def test_tenants_share_by_tokens_whatever_they_ask_for_at_once() -> None:
    world = World()
    world.submit(texts(400), tenant="greedy")
    modest = world.submit(texts(4), tenant="modest")
    steps = 0
    while modest.id not in world.ended:
        world.step()
        steps += 1
    assert steps <= 4
    assert abs(len(world.rows_of[1]) - 8) <= 8


def test_a_step_takes_no_longer_than_its_budget() -> None:
    world = World()
    world.submit(texts(100))
    for _ in range(20):
        batch = world.sent[0][1]
        world.step(batch.padded * 0.002)  # two milliseconds a token: 25 tokens fit in the budget
    assert world.sent[0][1].padded == 16


def test_texts_that_are_padded_to_a_full_step_do_not_make_steps_smaller() -> None:
    world = World()
    for _ in range(20):
        job = world.submit(texts(1))
        world.step(STEP_SECONDS, computed=MODEL.chunk_tokens)
        assert world.got(job) == [0]
    (host,) = world.encoding.hosts.values()
    assert host.budget == MODEL.chunk_tokens


def test_beside_realtime_generation_steps_are_smaller_and_in_a_crunch_there_are_none() -> None:
    world = World()
    world.budget = STEP_SECONDS / 2
    job = world.submit(texts(12))
    assert [batch.padded for _, batch in world.sent] == [MODEL.chunk_tokens / 2] * 2
    world.budget = 0.0
    world.run()
    assert world.held[-1] == "e"
    urgent = world.submit(texts(1), band="realtime")
    world.run()
    assert world.got(urgent) == [0]
    world.budget = STEP_SECONDS
    world.encoding.pump("e", world.now)
    world.run()
    assert world.got(job) == [*range(12)]


def test_what_a_dead_driver_was_computing_is_sent_to_another() -> None:
    world = World(hosts=2)
    job = world.submit(texts(12))
    assert {host.driver for host, _ in world.sent} == {"d0", "d1"}
    world.encoding.lose_host("d0/e", 0.0)
    world.sent = [entry for entry in world.sent if entry[0].driver == "d1"]
    world.run()
    assert world.got(job) == [*range(12)]


def test_without_a_host_jobs_wait_for_one() -> None:
    world = World()
    job = world.submit(texts(12))
    stale = world.sent.copy()
    world.encoding.lose_host("d0/e", 0.0)
    world.sent.clear()
    world.encoding.add_host(EncoderHost("d0", MODEL), 1.0)
    for host, batch in stale:
        world.encoding.done(host, batch, EncodedStep(bytes(4 * 4), 1, 1), 1.0)  # a word from the dead
    world.run()
    assert world.got(job) == [*range(12)]


def test_a_step_that_was_not_begun_is_repeated_and_one_that_failed_ends_its_jobs() -> None:
    world = World()
    first, second = world.submit(texts(1, 64)), world.submit(texts(1, 32, first=3))
    host, batch = world.sent.pop(0)
    world.encoding.repeat(host, batch, 0.0)
    host, batch = world.sent.pop(0)
    world.encoding.failed(host, batch, InvalidArgument("no"), 0.0)
    assert isinstance(world.ended[second.id], IOFailure)
    world.run()
    assert world.got(first) == [0]


def test_a_killed_job_gets_nothing_more_and_others_go_on() -> None:
    world = World()
    job, other = world.submit(texts(20)), world.submit(texts(2))
    world.encoding.kill(job, Canceled("gone"), 0.0)
    world.encoding.kill(job, Canceled("gone"), 0.0)
    world.run()
    assert isinstance(world.ended[job.id], Canceled)
    assert job.id not in world.rows_of
    assert world.got(other) == [0, 1]
    assert world.encoding.jobs == {}


def test_a_job_can_be_moved_to_another_band() -> None:
    world = World()
    batch = world.submit(texts(40), band="batch")
    other = world.submit(texts(40), tenant="b")
    world.encoding.nice(batch, "realtime", 0.0)
    world.step()
    assert tenants(world.sent[-1][1]) == {"a"}
    world.run()
    assert world.got(other) == world.got(batch)


def test_a_tenant_has_no_more_jobs_at_the_drivers_than_it_may() -> None:
    world = World()
    world.submit(texts(1, 64), max_running=1)
    world.submit(texts(1), max_running=1)
    assert len(world.sent) == 1
    other = world.submit(texts(1), tenant="b")
    world.run()
    assert world.got(other) == [0]
    assert len(world.ended) == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Encode(model="e", texts=[]), "1 to 4096 texts"),
        (Encode(model="e", texts=[[1] * 64] * 4097), "1 to 4096 texts"),
        (Encode(model="e", texts=[[1] * 128] * 4096), "524288 tokens"),
        (Encode(model="e", texts=[[]]), "text 0 has 0 tokens"),
        (Encode(model="e", texts=[[1], [1] * 65]), "text 1 has 65 tokens, not 1 to 64"),
        (Encode(model="e", texts=[[100]]), "outside 0 to 99"),
        (Encode(model="e", texts=[[-1]]), "outside 0 to 99"),
        (Encode(model="e", texts=[[1]], types=[[2]]), "type is outside 0 to 1"),
        (Encode(model="e", texts=[[1]], types=[[0, 0]]), "as many as"),
    ],
)
def test_what_would_spoil_a_shared_step_is_refused(request_: Encode, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_texts(MODEL, request_)

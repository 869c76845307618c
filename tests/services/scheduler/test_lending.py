"""Models that share the pages of a device: who gets them, who gives them back, and that all ends well."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import Canceled
from llmos.services.memory.invariants import check_all
from llmos.services.scheduler.queue import AGING_SECONDS
from llmos.services.scheduler.simulated_cache import LinkTime
from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Task
from tests.services.scheduler.traffic import check_all as check_ended
from tests.services.scheduler.traffic import model as own_model
from tests.services.scheduler.traffic import task as task_of

SLABS = 12
TIME = StepTime(base=1e-3, prefill=1e-5)
DEAR = StepTime(base=1e-3, prefill=1e-2)  # whatever can be swapped is


def model(name: str, slab_pages: int = 8, slabs: int = SLABS, host_pages: int = 0) -> LoadedModel:
    """A model with eight slots, and pages of four tokens in a pool with others."""
    alone = own_model(slots=8, pages=slabs * slab_pages, host_pages=host_pages)
    return msgspec.structs.replace(
        alone, model=name, pool="p", slabs=slabs, slab_pages=slab_pages, slab_bytes=12
    )


def simulator(*models: LoadedModel, time: StepTime = TIME, **options: object) -> Simulator:
    first, *others = models
    beside = [(each, time) for each in others]
    return Simulator(first, time, beside=beside, **options)  # type: ignore[arg-type]


def task(id: int, model: str, prompt: int, count: int, arrived: float = 0.0, band: int = 1) -> Task:
    made = task_of(id, [(id * 7 + i) % 256 for i in range(prompt)], count, arrived, band, tenant=model)
    made.model = model
    return made


def run(sim: Simulator, made: list[Task]) -> None:
    prompts = {each.id: list(each.tokens) for each in made}
    sim.submit(made)
    sim.run()
    check_ended(sim, made, prompts)
    check_all(sim.arenas)
    assert all(not host.tiers.away and not host.tiers.journeys for host in sim.hosts)


def hog(count: int = 8, band: int = 2) -> list[Task]:
    """Work of model ``a`` that takes the whole pool: 25 pages for each task, of 96."""
    return [task(i, "a", 40, 60, band=band) for i in range(count)]


def test_a_model_alone_uses_what_the_others_do_not() -> None:
    sim = simulator(model("a"), model("b"), model("c"))
    sim.submit(hog(3, band=1))
    sim.run(until=0.05)
    usage = sim.memories["sim0/a"].usage()
    assert usage.slabs > SLABS // 3
    assert len(sim.host.running) == 3
    assert sim.core.seating.displaced == 0


@pytest.mark.parametrize("band", [0, 1, 2])
def test_a_model_gets_its_share_back_at_once_whatever_its_band(band: int) -> None:
    sim = simulator(model("a"), model("b"))
    late = [task(100 + i, "b", 40, 40, arrived=0.5, band=band) for i in range(2)]  # 40 of its 48 pages
    made = hog(80, band=1) + late
    run(sim, made)
    assert all(sim.records[each.id].first_token < 0.1 for each in late)
    assert sim.core.seating.displaced > 0


def test_what_is_displaced_produces_the_same_tokens_when_it_is_swapped() -> None:
    sim = simulator(
        model("a", host_pages=500),
        model("b", slab_pages=6, host_pages=500),
        time=DEAR,
        link_time=LinkTime(host=1e6, disk=1e5),
        checked=True,
    )
    made = hog(16) + [task(100 + i, "b", 40, 40, arrived=1.0 + 0.02 * i) for i in range(8)]
    run(sim, made)
    assert sim.core.swapping.swapped > 0


def test_beyond_its_share_a_model_takes_from_lower_bands_only() -> None:
    """With four models a share is three slabs of eight pages; who needs 40 has more than that."""
    others = [model(name) for name in "bcd"]
    for band, waits in ((2, True), (1, False)):
        sim = simulator(model("a"), *others)
        big = task(100, "b", 160, 8, arrived=0.5, band=band)
        run(sim, [*hog(80), big])
        assert (sim.records[100].first_token > 0.5) == waits


def test_no_one_takes_from_a_model_that_has_its_share_or_less() -> None:
    sim = simulator(model("a"), model("b"))
    sim.submit([task(i, "a", 40, 40, band=2) for i in range(2)])
    sim.submit([task(100 + i, "b", 40, 200, arrived=0.01, band=1) for i in range(12)])
    sim.run(until=0.05)
    assert len(sim.host.running) == 2
    assert not any(task.displaced for task in sim.host.running)


def test_a_promised_deadline_is_kept_beside_a_hungry_model() -> None:
    sim = simulator(model("a"), model("b"))
    sim.submit([task(99, "a", 8, 16)])  # step times have to be known
    promised = [task(i, "a", 40, 60, arrived=1.0 + 0.001 * i, band=0) for i in range(3)]
    for each in promised:
        each.deadline = each.arrived + 0.5
    sim.submit([*promised, *[task(20 + i, "a", 40, 200, arrived=1.05, band=2) for i in range(8)]])
    sim.submit([task(100 + i, "b", 40, 200, arrived=1.06 + 0.002 * i, band=1) for i in range(12)])
    sim.run()
    assert all(sim.records[each.id].in_time for each in promised)


def test_nobody_waits_for_ever_beside_a_flood() -> None:
    """One model has far more to do than can be done; each of the others is served as it comes."""
    sim = simulator(
        *(model(name, slab_pages) for name, slab_pages in zip("abcd", (8, 4, 12, 5), strict=True))
    )
    flood = [task(i, "a", 40, 100, band=1) for i in range(150)]
    late = [
        task(200 + i, "bcd"[i % 3], 20, 20, arrived=0.2 + 0.05 * i, band=(2, 1)[i % 2]) for i in range(30)
    ]
    run(sim, flood + late)
    assert max(sim.records[each.id].first_token for each in late) < 0.2


def test_pages_are_lent_anew_after_a_restart_of_memory_and_when_a_host_is_lost() -> None:
    sim = simulator(model("a"), model("b", slab_pages=6))
    made = hog(40) + [task(100 + i, "b", 40, 60, arrived=0.3 + 0.05 * i) for i in range(10)]
    for at in (0.15, 0.4, 0.45, 0.9):
        sim.at(at, sim.restart_memory)
    run(sim, made)


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_ends_with_its_tokens_and_every_page_accounted_for(seed: int) -> None:
    rng = random.Random(seed)
    host_pages = rng.choice((0, 0, 300))
    models = [model(name, rng.randint(3, 12), host_pages=host_pages) for name in "abc"]
    slow_link = replace(LinkTime(), host=rng.choice((1e3, 1e6)))
    sim = simulator(*models, time=rng.choice((TIME, DEAR)), link_time=slow_link, checked=True)
    made = []
    for id in range(60):
        room = min(each.pages // SLABS for each in models) * (SLABS // 3) * 4  # tokens in the least share
        prompt = rng.randint(1, room // 2)
        count = rng.randint(1, room - prompt)
        name = rng.choices("abc", (6, 3, 1))[0]
        made.append(task(id, name, prompt, count, rng.uniform(0, 1.0), rng.randint(0, 2)))
    for _ in range(rng.choice((0, 0, 3))):
        sim.at(rng.uniform(0.1, 2.0), sim.restart_memory)
    for tick in range(200):
        sim.at(tick * 0.02, lambda: check_all(sim.arenas))
    run(sim, made)


SLOW = StepTime(base=5e-2, prefill=1e-5)


def full_shares() -> list[Task]:
    """More than models ``a``, ``c`` and ``d`` can do in two minutes, though one task fills a share."""
    return [task(1000 * n + i, name, 30, 60, band=1) for n, name in enumerate("acd") for i in range(16)]


def full(made: list[Task], large: list[Task]) -> Simulator:
    sim = simulator(*(model(name) for name in "abcd"), time=SLOW)
    run(sim, made + large)
    return sim


def test_a_task_larger_than_its_share_waits_little_longer_than_aging_and_keeps_what_it_is_lent() -> None:
    """A share is three slabs, it needs five; the others have work of its own band for longer."""
    large = task(9000, "b", 120, 40, arrived=5.0)
    sim = full(full_shares(), [large])
    record = sim.records[9000]
    assert AGING_SECONDS < record.first_token < AGING_SECONDS + 4.0
    assert large.displaced == 0
    assert max(record.ended for record in sim.records.values()) > 2 * AGING_SECONDS


def test_between_two_that_are_lent_pages_the_others_have_their_shares() -> None:
    made = full_shares()
    large = [task(9000 + i, "b", 120, 40, arrived=5.0) for i in range(2)]
    sim = full(made, large)
    first, second = (sim.records[each.id] for each in large)
    # It may borrow what is free for a moment, but has to give that back to who needs it for its share.
    turn = first.ended + AGING_SECONDS
    assert turn < second.ended < turn + 8.0
    for name in "acd":
        times = [at for each in made if each.model == name for at in sim.records[each.id].times]
        assert sum(first.ended < at < turn for at in times) > 100


def test_who_is_due_and_is_withdrawn_leaves_the_others_their_shares() -> None:
    sim = simulator(*(model(name) for name in "abcd"), time=SLOW)
    large, made = task(9000, "b", 120, 40, arrived=5.0), full_shares()
    sim.submit([*made, large])
    sim.run(until=38.0)
    assert large.pages
    sim.core.kill(large, Canceled("the test withdrew it"), sim.now)
    sim.run()
    assert all(sim.records[each.id].reason == "length" for each in made)
    assert not any(host.yields for host in sim.hosts)
    check_all(sim.arenas)

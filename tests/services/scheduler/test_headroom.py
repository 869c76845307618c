"""A tenant's flood leaves short steps, and slots, to those who ask for little; alone it takes everything."""

from __future__ import annotations

from llmos.services.scheduler.simulator import Simulator, StepTime
from llmos.services.scheduler.task import Place
from tests.services.scheduler.traffic import check_all, model, task


def flooded(others: int, *, weight: float = 1.0, band: int = 1) -> Simulator:
    """16 slots; 60 requests of one tenant at once, while each of the others has one that takes long."""
    sim = Simulator(model(slots=16, pages=2000), StepTime())
    calm = [task(1000 + i, [1] * 8, 400, tenant=f"calm{i}") for i in range(others)]
    flood = [task(i, [2] * 8, 100, arrived=0.1, band=band, tenant="flooder") for i in range(60)]
    for each in flood:
        each.weight = weight
    sim.submit([*calm, *flood])
    sim.run(until=0.3)
    return sim


def test_a_flood_takes_a_quarter_of_the_slots_beside_a_tenant_that_does_not_wait() -> None:
    assert flooded(others=1).host.tenants["flooder"] == 4


def test_a_tenant_of_twice_the_weight_takes_twice_as_many() -> None:
    assert flooded(others=1, weight=2.0).host.tenants["flooder"] == 8


def test_who_is_alone_takes_all() -> None:
    assert flooded(others=0).host.tenants["flooder"] == 16


def test_batch_work_takes_what_is_free_for_it_gives_way_at_once() -> None:
    assert flooded(others=1, band=2).host.tenants["flooder"] == 15


def test_nobody_is_held_back_where_all_wait() -> None:
    sim = Simulator(model(slots=16, pages=2000), StepTime())
    sim.submit([task(i, [1] * 8, 60, tenant=f"t{i % 2}") for i in range(80)])
    sim.run(until=0.2)
    assert sim.host.seated == 16


def test_what_is_beyond_rests_while_a_light_tenant_is_here_and_loses_nothing() -> None:
    sim = Simulator(model(slots=16, pages=2000), StepTime())
    flood = [task(i, [2] * 8, 400, tenant="flooder") for i in range(16)]
    light = task(99, [1] * 8, 40, arrived=0.2, tenant="light")
    prompts = {each.id: list(each.tokens) for each in (*flood, light)}
    sim.submit([*flood, light])
    sim.run(until=0.3)
    assert len(sim.host.resting) == 16 - 1 - 4, "a slot for the light tenant, a quarter of all for the flood"
    made = {each.id: each.produced for each in flood if each.id in sim.host.resting}
    sim.run(until=0.35)
    assert all(each.produced == made[each.id] for each in flood if each.id in made)
    assert light.place is Place.RUNNING
    sim.run()
    check_all(sim, [*flood, light], prompts)
    assert sum(each.displaced for each in flood) == 1
    assert sim.prefilled <= 17 * 8 + 1, "no prompt is computed again, but for the token it goes on from"


def test_who_is_within_its_share_takes_the_slot_of_one_who_is_beyond() -> None:
    sim = Simulator(model(slots=16, pages=2000), StepTime())
    flood = [task(i, [2] * 8, 400, tenant="flooder") for i in range(60)]
    light = [task(100 + i, [1] * 8, 40, arrived=0.2, tenant="light") for i in range(6)]
    sim.submit([*flood, *light])
    sim.run(until=0.25)
    assert sim.host.tenants["light"] == 4, "its own share, and no more"
    assert all(sim.records[each.id].times for each in light[:4])


def test_others_within_their_share_never_rest() -> None:
    sim = Simulator(model(slots=16, pages=2000), StepTime())
    sim.submit([task(i, [1] * 8, 200, tenant=f"t{i % 4}") for i in range(16)])
    sim.run(until=0.3)
    assert not sim.host.resting


def test_a_flood_moves_anothers_time_by_what_a_quarter_of_the_slots_adds() -> None:
    took = []
    for size in (0, 300):
        sim = Simulator(model(slots=64, pages=8000, page_tokens=16, chunk_tokens=512), StepTime())
        calm = [task(1000 + i, [i] * 64, 64, 0.005 + 0.01 * i, tenant=f"calm{i % 3}") for i in range(200)]
        sim.submit([*calm, *(task(i, [7 + i] * 64, 64, 1.0, tenant="flooder") for i in range(size))])
        sim.run()
        took.append(sorted(sim.records[each.id].ended - each.arrived for each in calm)[-2])
    assert took[1] <= 1.15 * took[0]

"""A tenant's flood leaves slots, and short steps, to those who ask for little; alone it takes everything."""

from __future__ import annotations

from llmos.services.scheduler.headroom import LINGER, Presence
from llmos.services.scheduler.simulator import Simulator, StepTime
from tests.services.scheduler.traffic import model, task


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


def test_a_tenant_counts_as_here_for_a_while_after_its_last_task() -> None:
    presence = Presence()
    for tenant in ("calm", "flooder"):
        presence.enter(tenant)
    waits = {"flooder"}.__contains__
    assert presence.light("flooder", waits, 0.0)
    presence.leave("calm", 1.0)
    assert presence.light("flooder", waits, 1.0 + LINGER)
    assert not presence.light("flooder", waits, 1.1 + LINGER)


def test_a_flood_moves_anothers_time_by_what_a_quarter_of_the_slots_adds() -> None:
    took = []
    for size in (0, 300):
        sim = Simulator(model(slots=64, pages=8000, page_tokens=16, chunk_tokens=512), StepTime())
        calm = [task(1000 + i, [i] * 64, 64, 0.01 * i, tenant=f"calm{i % 3}") for i in range(200)]
        sim.submit([*calm, *(task(i, [7 + i] * 64, 64, 1.0, tenant="flooder") for i in range(size))])
        sim.run()
        took.append(sorted(sim.records[each.id].ended - each.arrived for each in calm)[-2])
    assert took[1] <= 1.15 * took[0]

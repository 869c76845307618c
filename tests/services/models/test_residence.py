"""Who leaves its device for another: the one idle for longest of those that may, and nobody who is in use."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmos.ipc.errors import InvalidArgument
from llmos.services import manifest
from llmos.services.manifest import Manifest, ModelSpec
from llmos.services.models.residence import Standing, hopeful, until_due, victim

IDLE = Standing("idle", may=True, residence="awake", idle=5.0)


@pytest.mark.parametrize(
    ("park", "seconds"), [("never", 0.0), ("pressure", 0.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)]
)
def test_a_model_says_after_how_long_it_is_parked(park: str, seconds: float) -> None:
    assert manifest.park_seconds(ModelSpec(name="m", park=park)) == seconds


@pytest.mark.parametrize("park", ["", "0s", "10", "10 m", "-1m", "1d", "idle", "nan", "1e9s"])
def test_a_manifest_that_says_it_wrongly_is_refused(park: str) -> None:
    with pytest.raises(InvalidArgument, match='model \'m\': park is "never", "pressure", or a time'):
        manifest.check(Manifest(models=[ModelSpec(name="m", driver="jax0", park=park)]))


def test_the_one_idle_for_longest_leaves() -> None:
    assert (
        victim([IDLE, replace(IDLE, name="older", idle=9.0), replace(IDLE, name="new", idle=1.0)]) == "older"
    )


@pytest.mark.parametrize(
    "change", [{"may": False}, {"idle": 0.0}, {"residence": "parked"}, {"residence": "waking"}], ids=str
)
def test_who_may_not_or_is_in_use_or_not_there_stays(change: dict[str, object]) -> None:
    assert victim([replace(IDLE, **change)]) is None  # type: ignore[arg-type]


def test_waiting_helps_while_one_that_may_leave_is_in_use_or_on_its_way() -> None:
    assert hopeful([replace(IDLE, idle=0.0)])
    assert hopeful([replace(IDLE, residence="parking")])
    assert hopeful([replace(IDLE, residence="waking")])
    assert not hopeful([replace(IDLE, residence="waking", starved=True)])
    assert not hopeful([replace(IDLE, residence="parked")])
    assert not hopeful([replace(IDLE, may=False, idle=0.0)])
    assert not hopeful([])


def test_a_model_is_looked_at_when_it_can_be_due_and_seldom_while_it_is_busy() -> None:
    assert until_due(0.0, 600.0) == 600.0
    assert until_due(450.0, 600.0) == 150.0
    assert until_due(599.999, 600.0) == 6.0


def test_any_set_of_models_that_fits_alone_gets_its_turns() -> None:
    """Models of one device under random traffic: whoever wants it has it as soon as those before are idle."""
    chance = random.Random(1)
    for _ in range(300):
        room, names = chance.randint(1, 3), "abcdef"[: chance.randint(2, 6)]
        awake, used = set(names[:room]), dict.fromkeys(names, 0)
        for now in range(1, 60):
            wanted = chance.choice(names)
            busy = {name for name in awake if chance.random() < 0.4} - {wanted}
            if wanted not in awake and len(awake) == room:
                standings = [
                    Standing(
                        name,
                        True,
                        "awake" if name in awake else "parked",
                        0.0 if name in busy else now - used[name],
                    )
                    for name in names
                    if name != wanted
                ]
                leaving = victim(standings)
                assert (leaving is None) == (busy == awake)
                if leaving is None:
                    assert hopeful(standings)
                    continue
                assert leaving in awake - busy
                assert used[leaving] == min(used[name] for name in awake - busy)
                awake.remove(leaving)
            awake.add(wanted)
            used[wanted] = now
            for name in busy:
                used[name] = now
            assert len(awake) <= room

"""Parking: one passage of a model at a time; what comes meanwhile waits; a failure changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from llmos.drivers.sdk.driver import Driver, Finish, PendingMove
from llmos.drivers.sdk.messages import Moved
from llmos.drivers.sdk.parking import Parking
from llmos.ipc.errors import Busy, Canceled, LLMOSError, NoMemory, NotSupported


class ByHand:
    """A background whose work is done when the test says so."""

    def __init__(self) -> None:
        self.open: list[tuple[Future[Any], Callable[[], Any], Callable[[Future[Any]], None]]] = []

    def run(self, work: Callable[[], Any], done: Callable[[Future[Any]], None]) -> Future[Any]:
        future: Future[Any] = Future()
        self.open.append((future, work, done))
        return future

    def copy(self) -> Callable[[], None]:
        """Do the oldest work; what is returned tells the loop."""
        future, work, done = self.open.pop(0)
        try:
            future.set_result(work())
        except LLMOSError as error:
            future.set_exception(error)
        return lambda: done(future)

    def turn(self) -> None:
        self.copy()()


class Recording(Driver):
    """Moves 8 bytes out and 9 back; ``trouble`` is raised by the copying."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.trouble: LLMOSError | None = None

    def park(self, model: str) -> PendingMove:
        self.calls.append(f"park {model}")
        return lambda: self._copied(8)

    def wake(self, model: str) -> PendingMove:
        self.calls.append(f"wake {model}")
        return lambda: self._copied(9)

    def _copied(self, size: int) -> Finish:
        if self.trouble is not None:
            raise self.trouble
        return lambda: Moved(size, 1)


class Asked:
    """Who asked, and what they were told."""

    def __init__(self) -> None:
        self.told: Moved | LLMOSError | None = None

    def done(self, moved: Moved) -> None:
        assert self.told is None
        self.told = moved

    def fail(self, error: LLMOSError) -> None:
        assert self.told is None
        self.told = error


class World:
    def __init__(self, driver: Driver | None = None) -> None:
        self.driver = Recording()
        self.background = ByHand()
        self.abandoned: list[str] = []
        self.parking = Parking(driver or self.driver, self.background, self.abandoned.append)  # type: ignore[arg-type]

    def park(self) -> Asked:
        asked = Asked()
        self.parking.park("m", asked)
        return asked

    def wake(self) -> Asked:
        asked = Asked()
        self.parking.wake("m", asked)
        return asked

    def is_parked(self) -> bool:
        try:
            self.parking.check("m")
        except Busy:
            return True
        return False


@pytest.fixture
def world() -> World:
    return World()


def test_a_model_is_used_by_nobody_from_the_call_until_it_is_awake_again(world: World) -> None:
    assert not world.is_parked()
    out = world.park()
    assert world.is_parked()
    assert world.abandoned == ["m"]
    world.background.turn()
    assert (out.told, world.is_parked()) == (Moved(8, 1), True)
    back = world.wake()
    assert world.is_parked()
    world.background.turn()
    assert (back.told, world.is_parked()) == (Moved(9, 1), False)


def test_asking_again_does_nothing(world: World) -> None:
    assert world.wake().told == Moved(0, 0)
    asked = [world.park(), world.park()]
    world.background.turn()
    assert [each.told for each in asked] == [Moved(8, 1), Moved(0, 0)]
    asked = [world.wake(), world.wake()]
    world.background.turn()
    assert [each.told for each in asked] == [Moved(9, 1), Moved(0, 0)]
    assert world.driver.calls == ["park m", "wake m"]


def test_what_comes_on_the_way_follows_in_order(world: World) -> None:
    asked = [world.park(), world.wake(), world.park()]
    for _ in asked:
        assert len(world.background.open) == 1, "never two at once"
        world.background.turn()
    assert world.driver.calls == ["park m", "wake m", "park m"]
    assert world.parking.parked("m")


def test_a_model_that_does_not_fit_stays_where_it_is(world: World) -> None:
    world.park()
    world.background.turn()
    world.driver.trouble = NoMemory("full")
    asked = world.wake()
    world.background.turn()
    assert isinstance(asked.told, NoMemory)
    assert world.parking.parked("m")
    world.driver.trouble = None
    asked = world.wake()
    world.background.turn()
    assert asked.told == Moved(9, 1)


def test_a_driver_without_it_says_so_and_the_model_stays_awake() -> None:
    world = World(Driver())
    assert isinstance(world.park().told, NotSupported)
    assert not world.is_parked()


def test_unloading_ends_a_passage_and_what_waits_for_it(world: World) -> None:
    out, back = world.park(), world.wake()
    copied = world.background.copy()
    world.parking.forget("m")
    assert isinstance(out.told, Canceled)
    assert isinstance(back.told, Canceled)
    copied()
    assert not world.is_parked()

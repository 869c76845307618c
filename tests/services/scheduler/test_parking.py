"""The scheduler's word on parking: who is idle, when a model may go, and who says that it is needed again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import Busy, LLMOSError, NoMemory
from llmos.services.scheduler.messages import Park
from llmos.services.scheduler.parking import Parking
from llmos.services.scheduler.task import Place

MODEL = LoadedModel(
    model="m", family="null", parameters=0, weight_bytes=0, pages=8, page_tokens=4, page_bytes=4, slots=1,
    max_context=32, chunk_tokens=8, vocab_size=256, stop_tokens=[], attention="none",
)  # fmt: skip


class Call:
    """A call of the models service, and what it was answered."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.on_cancel: Any = None

    def chunk(self, body: object) -> None:
        self.answers.append("chunk")

    def end(self) -> None:
        self.answers.append("end")


class World:
    """As much of the core and of encoding as parking looks at."""

    def __init__(self) -> None:
        self.tasks: dict[int, Any] = {}
        self.jobs: dict[int, Any] = {}
        self.models: dict[str, LoadedModel] = {}
        self.ended: list[tuple[int, LLMOSError]] = []
        self.unhosted = 0
        self.now = 100.0
        self.parking = Parking(self, self)  # type: ignore[arg-type]

    def learn(self, model: LoadedModel) -> None:
        self.models[model.model] = model

    def kill(self, task: Any, error: LLMOSError, now: float) -> None:
        self.ended.append((task.id, error))
        (self.tasks if task.id in self.tasks else self.jobs).pop(task.id)

    def come(self, id: int, place: Place = Place.WAITING) -> None:
        self.tasks[id] = SimpleNamespace(id=id, model="m", place=place)
        self.parking.used("m", self.now)

    def go(self, id: int) -> None:
        del self.tasks[id]
        self.parking.used("m", self.now)

    def park(self, **fields: Any) -> Call:
        call = Call()
        request = Park(driver="d", model=MODEL, **fields)
        self.parking.park(request, call, self.unhost, self.now)  # type: ignore[arg-type]
        return call

    def unhost(self) -> None:
        self.unhosted += 1


@pytest.fixture
def world() -> World:
    made = World()
    made.parking.awake("m", made.now)
    return made


def test_an_idle_model_is_given_up_and_the_first_task_ends_the_call(world: World) -> None:
    call = world.park()
    assert (call.answers, world.unhosted) == (["chunk"], 1)
    assert "m" in world.models, "tasks for it may wait"
    world.come(1)
    world.come(2)
    assert call.answers == ["chunk", "end"]


@pytest.mark.parametrize("place", [place for place in Place if place not in (Place.STOPPED, Place.ENDED)])
def test_a_model_with_a_task_stays(world: World, place: Place) -> None:
    world.come(1, place)
    with pytest.raises(Busy) as caught:
        world.park()
    assert (caught.value.details, world.unhosted) == ({"idle": 0.0}, 0)


def test_a_job_for_an_encoder_keeps_it_too(world: World) -> None:
    world.jobs[1] = SimpleNamespace(id=1, model="m")
    with pytest.raises(Busy):
        world.park()


def test_a_stopped_task_does_not_and_wakes_it_when_it_goes_on(world: World) -> None:
    world.come(1, Place.STOPPED)
    call = world.park()
    assert call.answers == ["chunk"]
    world.come(1)
    assert call.answers == ["chunk", "end"]


def test_idleness_counts_from_the_last_task_or_from_hosting(world: World) -> None:
    def idle() -> float:
        return world.parking.idle("m", world.parking.busy(), world.now)

    world.now += 3
    assert idle() == 3.0
    world.come(1)
    world.now += 5
    assert idle() == 0.0
    world.go(1)
    world.now += 2
    assert idle() == 2.0
    with pytest.raises(Busy) as caught:
        world.park(idle=2.5)
    assert caught.value.details == {"idle": 2.0}
    assert world.park(idle=2.0).answers == ["chunk"]


def test_what_waits_for_a_model_that_cannot_be_woken_is_told_why(world: World) -> None:
    world.come(1)
    world.come(2, Place.STOPPED)
    world.jobs[3] = SimpleNamespace(id=3, model="m")
    call = world.park(refuse="no room")
    assert [(id, type(error), error.message) for id, error in world.ended] == [
        (1, NoMemory, "no room"), (3, NoMemory, "no room"),
    ]  # fmt: skip
    assert call.answers == ["chunk"]


def test_hosting_it_ends_the_call_and_so_does_another(world: World) -> None:
    first, second = world.park(), world.park()
    assert (first.answers, second.answers) == (["chunk", "end"], ["chunk"])
    world.parking.awake("m", world.now)
    assert second.answers == ["chunk", "end"]


def test_a_models_service_that_left_is_told_nothing_more(world: World) -> None:
    call = world.park()
    call.on_cancel()
    world.come(1)
    assert call.answers == ["chunk"]

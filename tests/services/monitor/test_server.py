"""Monitor as a process: it answers whoever else is down, and sees them come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Server, method
from llmos.services.models.messages import ModelLine, ModelList
from llmos.services.monitor.messages import Snapshot
from llmos.services.scheduler.messages import SchedulerStats

POLLED = ["kernel.names", "kernel.stats", "scheduler.stats", "memory.usage", "models.list"]
GRANTS = {
    "monitor": Grant(principal="monitor", tenant="system", serves="monitor", calls=POLLED),
    "scheduler": Grant(principal="scheduler", tenant="system", serves="scheduler"),
    "models": Grant(principal="models", tenant="system", serves="models"),
    "user": Grant(principal="user", tenant="local", calls=["monitor.snapshot", "kernel.names"]),
}


class FakeScheduler(Server):
    name: ClassVar[str] = "scheduler"

    @method
    def stats(self, request: None, call: Incoming) -> SchedulerStats:
        return SchedulerStats(waiting=0, running=0, finished=1, displaced=0, tokens=9, served={}, hosts=[])


class FakeModels(Server):
    name: ClassVar[str] = "models"

    @method
    def list(self, request: None, call: Incoming) -> ModelList:
        return ModelList([ModelLine(name="m", state="ready", driver="d")])


@pytest.fixture
def booted(system: Callable[[dict[str, Grant]], Any]) -> Any:
    one = system(GRANTS)
    one.kernel()
    one.spawn("monitor", "llmos.services.monitor")
    one.wait_ready("monitor")
    return one


def seen(booted: Any, condition: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot that satisfies a condition; the test's timeout bounds the wait."""
    client = booted.client()
    while True:
        snapshot = client.call("monitor.snapshot", None, Snapshot)
        if condition(snapshot):
            return snapshot


def test_alone_it_says_what_is_missing(booted: Any) -> None:
    snapshot = seen(booted, lambda s: s.kernel is not None and bool(s.services))
    assert not snapshot.health.ok
    assert {"scheduler is not running", "models is not running"} <= set(snapshot.health.reasons)
    assert snapshot.scheduler is None
    assert (snapshot.models, snapshot.arenas) == ([], [])


def test_it_sees_services_come_and_go(booted: Any) -> None:
    booted.serve(FakeScheduler(booted.run))
    models = booted.serve(FakeModels(booted.run))
    # Nobody may be "memory" here, so it is not missed: it is in no boot file.
    snapshot = seen(booted, lambda s: s.health.ok or s.health.reasons == ["security is not running"])
    assert snapshot.scheduler is not None
    assert snapshot.scheduler.tokens == 9
    assert [model.name for model in snapshot.models] == ["m"]
    models.finish()
    snapshot = seen(booted, lambda s: "models is not running" in s.health.reasons)
    assert "scheduler is not running" not in snapshot.health.reasons


def test_it_comes_back_with_a_new_kernel(booted: Any) -> None:
    seen(booted, lambda s: s.kernel is not None)
    booted.processes["kernel"].kill()
    booted.processes["kernel"].wait()
    booted.kernel()
    booted.wait_ready("monitor")
    assert seen(booted, lambda s: s.kernel is not None).age < 5

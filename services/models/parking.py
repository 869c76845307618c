"""Parks models that nobody needs and wakes them when somebody does, by messages to scheduler and drivers.

The scheduler goes first: it gives a model up only while there is no task, and its call stays open to say that
one has come. Tasks wait there meanwhile, with their deadlines, and however many they are, one call wakes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from llmos.drivers.sdk.messages import Park as ParkRequest
from llmos.drivers.sdk.messages import Wake as WakeRequest
from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import Busy, HostDown, LLMOSError, NoMemory, NotSupported
from llmos.ipc.header import Kind
from llmos.ipc.server import Server
from llmos.services import manifest
from llmos.services.models import residence
from llmos.services.models.hosting import Model
from llmos.services.models.residence import Standing
from llmos.services.scheduler.messages import Park, SchedulerStats

log = logging.getLogger("llmos.models")
RETRY_SECONDS = 0.2

Told = Callable[[LLMOSError | None], None]


class Parking:
    """``host`` tells the scheduler of a model that is awake; ``neighbours`` are all on a driver."""

    def __init__(
        self, server: Server, host: Callable[[Model], None], neighbours: Callable[[str], list[Model]]
    ) -> None:
        self._server = server
        self._host = host
        self._neighbours = neighbours
        self._looks: dict[str, object] = {}
        self._wanted: set[str] = set()
        self._starved: set[str] = set()
        self._arrivals: dict[str, list[Told]] = {}

    # --- out ---

    def watch(self, model: Model) -> None:
        """A model is awake and hosted: park it once it was idle for as long as the manifest says."""
        self._arrived(model, None)
        after = manifest.park_seconds(model.spec)
        token = self._looks[model.spec.name] = object()

        def look() -> None:
            if self._looks.get(model.spec.name) is token and model.residence == "awake":
                self.park(model, told, idle=after)

        def told(error: LLMOSError | None) -> None:
            if error is not None and model.parkable:
                idle = error.details.get("idle") if isinstance(error, Busy) else None
                known = idle if isinstance(idle, float) else 0.0
                self._server.after(residence.until_due(known, after), look)

        if after and model.parkable:
            self._server.after(after, look)

    def park(self, model: Model, told: Told, idle: float = 0.0) -> None:
        """Park a model that had no task for ``idle`` seconds; Busy, with how long it was, if it had one."""
        if model.residence == "parked":
            told(None)
        elif model.residence != "awake" or not model.hosted:
            told(Busy(f"model {model.spec.name!r} is being loaded, parked or woken; try again later"))
        else:
            self.declare(model, told, idle=idle)

    def declare(self, model: Model, told: Told, idle: float = 0.0, refuse: str = "") -> None:
        """Have the scheduler give a model up, or know of one that is parked; see ``Park``."""
        loaded, begun = model.loaded, False
        assert loaded is not None

        def listener(answer: Answer) -> None:
            nonlocal begun
            if model.loaded is not loaded:
                if not begun:
                    begun = True
                    told(HostDown(f"the driver of {loaded.model!r} went down"))
            elif answer.kind == Kind.CHUNK:
                begun = True
                self._given_up(model, told)
            elif answer.error is None:
                self._called(model)
            elif not begun:
                if isinstance(answer.error, Busy) and model.residence == "parked":
                    self.wake(model)
                told(answer.error)

        body = Park(
            driver=model.spec.driver, model=loaded, adapters=model.identities, idle=idle, refuse=refuse
        )
        self._server.call("scheduler.park", body, listener)

    def _given_up(self, model: Model, told: Told) -> None:
        if model.residence != "awake":
            model.hosted = True
            model.settle()
            told(None)
            return
        loaded, model.residence = model.loaded, "parking"

        def listener(answer: Answer) -> None:
            error = answer.error
            if model.loaded is not loaded or isinstance(error, HostDown):
                told(error or HostDown(f"the driver of {model.spec.name!r} went down"))
                return
            if error is None:
                log.info("%s is parked", model.spec.name)
                self._parked(model)
            else:
                log.warning("%s cannot be parked: %s", model.spec.name, error)
                model.residence, model.parkable = "awake", not isinstance(error, NotSupported)
                self._wanted.discard(model.spec.name)
                self._host(model)
            told(error)

        self._server.call(f"driver.{model.spec.driver}.park", ParkRequest(model.spec.name), listener)

    def _parked(self, model: Model) -> None:
        model.residence = "parked"
        if model.spec.name in self._wanted:
            self.wake(model)
        elif not model.hosted:
            # The scheduler was started anew meanwhile, and has not heard of it.
            self.declare(model, _ignore)

    # --- back ---

    def _called(self, model: Model) -> None:
        """A task came for a model that the scheduler had given up."""
        if model.residence in ("parking", "parked"):
            self.wake(model)

    def wake(self, model: Model, told: Told | None = None) -> None:
        """Wake a model, if it is not awake; ``told`` once it is, or of the error that keeps it from it."""
        if model.residence == "awake":
            if told is not None:
                told(None)
            return
        if told is not None:
            self._arrivals.setdefault(model.spec.name, []).append(told)
        if model.residence == "parking":
            self._wanted.add(model.spec.name)
        elif model.residence == "parked":
            self._wanted.discard(model.spec.name)
            model.residence = "waking"
            self._wake(model)

    def forget(self, told: Told) -> None:
        """Tell this one nothing any more."""
        for arrivals in self._arrivals.values():
            if told in arrivals:
                arrivals.remove(told)

    def lost(self, model: Model, error: LLMOSError | None = None) -> None:
        """A model is not on its driver any more, or of no use there."""
        self._looks.pop(model.spec.name, None)
        self._wanted.discard(model.spec.name)
        self._starved.discard(model.spec.name)
        gone = HostDown(f"model {model.spec.name!r} is not on its driver any more")
        self._arrived(model, error or gone)

    def _wake(self, model: Model) -> None:
        loaded, began = model.loaded, time.monotonic()

        def listener(answer: Answer) -> None:
            if model.loaded is not loaded or isinstance(answer.error, HostDown):
                return
            if answer.error is None:
                model.residence, model.woke = "awake", time.monotonic() - began
                log.info("%s is awake after %.3f s", model.spec.name, model.woke)
                # Until the scheduler hosts it, it can be neither used nor parked again.
                model.hosted = False
                self._host(model)
            elif isinstance(answer.error, NoMemory):
                self.make_room(
                    model,
                    wanting=lambda: model.residence == "waking" and model.loaded is loaded,
                    then=lambda: self._wake(model),
                    otherwise=lambda: self._refuse(model, answer.error),
                )
            else:
                self._refuse(model, answer.error)

        self._server.call(f"driver.{model.spec.driver}.wake", WakeRequest(model.spec.name), listener)

    def _refuse(self, model: Model, error: LLMOSError | None) -> None:
        """A model stays parked; who waits for it is told why, and the next one to ask makes it try again."""
        log.error("%s cannot be woken: %s", model.spec.name, error)
        model.residence = "parked"
        self.declare(model, _ignore, refuse=f"model {model.spec.name!r} cannot be woken: {error}")
        self._arrived(model, error)

    def _arrived(self, model: Model, error: LLMOSError | None) -> None:
        for told in self._arrivals.pop(model.spec.name, []):
            told(error)

    # --- room ---

    def make_room(
        self,
        model: Model,
        wanting: Callable[[], bool],
        then: Callable[[], None],
        otherwise: Callable[[], None],
    ) -> None:
        """Park another model of the driver and do ``then``; wait where all are in use; do ``otherwise`` where
        none may leave. Nothing of it once ``wanting`` says no."""
        name = model.spec.name
        self._starved.add(name)

        def again() -> None:
            if wanting():
                self.make_room(model, wanting, then, otherwise)

        def listener(answer: Answer) -> None:
            if not wanting():
                return
            if answer.error is not None:
                self._server.after(RETRY_SECONDS, again)
                return
            others = [other for other in self._neighbours(model.spec.driver) if other is not model]
            standings = self._standings(others, codec.decode(answer.body, SchedulerStats))
            leaving = residence.victim(standings)
            if leaving is not None:
                self.park(next(each for each in others if each.spec.name == leaving), told)
            elif residence.hopeful(standings):
                self._server.after(RETRY_SECONDS, again)
            else:
                self._starved.discard(name)
                otherwise()

        def told(error: LLMOSError | None) -> None:
            if isinstance(error, Busy | HostDown):
                self._server.after(RETRY_SECONDS, again)
            elif wanting():
                self._starved.discard(name)
                then() if error is None else otherwise()

        self._server.call("scheduler.stats", None, listener, timeout=10)

    def _standings(self, models: list[Model], stats: SchedulerStats) -> list[Standing]:
        idle = {(line.driver, line.model): line.idle for line in stats.hosts}
        return [
            Standing(
                model.spec.name,
                may=model.spec.park != "never" and model.parkable,
                residence=model.residence,
                idle=idle.get((model.spec.driver, model.spec.name), 0.0),
                starved=model.spec.name in self._starved,
            )
            for model in models
            if model.loaded is not None or model.loading
        ]


def _ignore(error: LLMOSError | None) -> None:
    """Nobody waits for this."""

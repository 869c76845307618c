"""Models that are parked, and since when nobody has needed the others.

The models service parks and wakes; whether there is a task is known only here.
"""

from __future__ import annotations

from collections.abc import Callable

from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.errors import Busy, NoMemory
from llmos.ipc.server import Incoming
from llmos.services.scheduler.core import Core
from llmos.services.scheduler.encoding import Encoding
from llmos.services.scheduler.messages import Park
from llmos.services.scheduler.task import Place


class Parking:
    """``waiting`` holds for each parked model the call that ends when a task comes for it."""

    def __init__(self, core: Core, encoding: Encoding) -> None:
        self._core = core
        self._encoding = encoding
        self._used: dict[str, float] = {}
        self.waiting: dict[str, Incoming] = {}

    def busy(self) -> set[str]:
        """Models with a task that runs or waits; one that was stopped does neither."""
        tasks = {task.model for task in self._core.tasks.values() if task.place is not Place.STOPPED}
        return tasks | {job.model for job in self._encoding.jobs.values()}

    def idle(self, model: str, busy: set[str], now: float) -> float:
        """Seconds since a model was last used; 0.0 while it is."""
        return 0.0 if model in busy else now - self._used.get(model, now)

    def used(self, model: str, now: float) -> None:
        """A task came or went: whoever waits to wake the model is told."""
        self._used[model] = now
        if model in self.waiting and model in self.busy():
            self.waiting.pop(model).end()

    def awake(self, model: str, now: float) -> None:
        """A model is hosted, so nobody has to wake it."""
        self._used[model] = now
        if model in self.waiting:
            self.waiting.pop(model).end()

    def park(self, request: Park, call: Incoming, unhost: Callable[[], object], now: float) -> None:
        """Unhost a model and tell the call when a task comes; Busy, before any effect, unless it is idle."""
        model = request.model
        if request.refuse:
            self._refuse(model, NoMemory(request.refuse), now)
        busy = self.busy()
        idle = self.idle(model.model, busy, now)
        if model.model in busy or idle < request.idle:
            raise Busy(f"{model.model} is in use, or was {idle:.1f} s ago", idle=idle)
        unhost()
        if model.kind == "encoder":
            self._encoding.models[model.model] = model
        else:
            self._core.learn(model)
        if model.model in self.waiting:
            self.waiting.pop(model.model).end()
        self.waiting[model.model] = call
        call.on_cancel = lambda: self._withdraw(model.model, call)
        call.chunk(None)

    def _withdraw(self, model: str, call: Incoming) -> None:
        if self.waiting.get(model) is call:
            del self.waiting[model]

    def _refuse(self, model: LoadedModel, error: NoMemory, now: float) -> None:
        for task in list(self._core.tasks.values()):
            if task.model == model.model and task.place is not Place.STOPPED:
                self._core.kill(task, error, now)
        for job in list(self._encoding.jobs.values()):
            if job.model == model.model:
                self._encoding.kill(job, error, now)

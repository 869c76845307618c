"""The message handlers of monitor."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import ClassVar

from llmos.ipc.calls import Answer
from llmos.ipc.server import Incoming, Server, method
from llmos.services.monitor import health
from llmos.services.monitor.messages import Health, Snapshot
from llmos.services.monitor.poller import Poller, Question

POLL_SECONDS = 1.0
ANSWER_SECONDS = 2.0
log = logging.getLogger("llmos.monitor")


class MonitorServer(Server):
    """Asks everyone each second; works with whoever answers."""

    name: ClassVar[str] = "monitor"
    watch: ClassVar[bool] = True

    def start(self) -> None:
        self._answers = Poller()
        self._progress: health.Progress | None = None
        self._polled = time.monotonic()
        self._said: list[str] = []
        self._poll()
        self.every(POLL_SECONDS, self._poll)

    def on_down(self, name: str, connection: int) -> None:
        self._answers.forget(name)
        self._poll()

    def on_up(self, name: str, connection: int) -> None:
        self._poll()

    def on_kernel_restart(self) -> None:
        self._answers.reset()
        self._poll()

    @method
    def snapshot(self, request: None, call: Incoming) -> Snapshot:
        answers = self._answers
        return Snapshot(
            age=time.monotonic() - self._polled,
            health=self._health(),
            kernel=answers.kernel,
            services=answers.names.names if answers.names else [],
            scheduler=answers.scheduler,
            arenas=answers.memory.arenas if answers.memory else [],
            models=answers.models.models if answers.models else [],
        )

    def _poll(self) -> None:
        for question in self._answers.ask():
            self.call(question.target, None, partial(self._take, question), timeout=ANSWER_SECONDS)

    def _take(self, question: Question, answer: Answer) -> None:
        self._answers.take(question, answer)
        now = time.monotonic()
        if question.target == "scheduler.stats":
            self._progress = health.advance(self._progress, self._answers.scheduler, now)
        if self._answers.complete:
            self._polled = now
            self._say(self._health())

    def _health(self) -> Health:
        answers = self._answers
        return health.judge(
            answers.names.names if answers.names else None,
            answers.scheduler,
            answers.models.models if answers.models else None,
            self._progress,
            time.monotonic(),
        )

    def _say(self, state: Health) -> None:
        """Log a change of health, once."""
        if state.reasons != self._said:
            self._said = state.reasons
            log.info("health: %s", "ok" if state.ok else "; ".join(state.reasons))

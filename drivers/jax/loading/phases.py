"""What a load is at: how long each phase has taken, and the progress that is reported meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from llmos.drivers.jax.execution.compiling import HEARTBEAT_S
from llmos.drivers.sdk.driver import Progress
from llmos.drivers.sdk.messages import LoadProgress


class Phases:
    """``report`` is called on the thread that loads; others note how far they are, for it to tell."""

    def __init__(self, report: Progress) -> None:
        self.report = report
        self._seconds: dict[str, float] = {}
        self._latest = LoadProgress("read", 0, 0)

    def begin(self) -> None:
        """Report that a load has begun."""
        self.report(self._latest)

    def timed(self, phase: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``, which is a phase."""
        begun = time.perf_counter()
        result = work()
        self._seconds[phase] = time.perf_counter() - begun
        return result

    def note(self, phase: Any) -> Callable[[int, int], None]:
        """Takes how much of a phase is done, of how much; on any thread."""

        def note(done: int, total: int) -> None:
            self._latest = LoadProgress(phase, done, total)

        return note

    def compiling(self, loading: Future[Any] | None) -> Callable[[int, int], None]:
        """Reports compiling, and stops it when the weights turn out to be bad."""

        def report(done: int, total: int) -> None:
            if loading is not None and loading.done():
                loading.result()
            self.report(LoadProgress("compile", done, total))

        return report

    def attend(self, loading: Future[Any]) -> Any:
        """What another thread makes, waited for with a report now and then."""
        while True:
            try:
                return loading.result(timeout=HEARTBEAT_S)
            except TimeoutError:
                self.report(self._latest)

    def described(self) -> dict[str, float]:
        """Seconds by phase."""
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}

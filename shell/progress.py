"""Bars for what takes longer than a moment; on a pipe, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from llmos.shell.output import is_terminal, say

LINE_SECONDS = 5.0


class Bar:
    """One activity: phases that each have a total, known or not.

    On a terminal a bar that is redrawn; elsewhere a line at each new phase and every five seconds.
    ``bytes`` shows amounts as sizes with a rate.
    """

    def __init__(self, title: str, *, bytes: bool = False) -> None:
        self._title = title
        self._phase = ""
        self._last_line = 0.0
        self._rich: Any = _rich_bar(bytes) if is_terminal() else None
        self._task = self._rich.add_task(title, total=None) if self._rich else None

    def __enter__(self) -> Bar:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, phase: str, done: float, total: float) -> None:
        """How far it is; ``total`` 0 where that is not known."""
        if self._rich is not None:
            title = f"{self._title}: {phase}"
            self._rich.update(self._task, description=title, completed=done, total=total or None)
            return
        now = time.monotonic()
        if phase != self._phase or now - self._last_line >= LINE_SECONDS:
            share = f" {100 * done / total:.0f}%" if total else ""
            say(f"{self._title}: {phase}{share}")
            self._phase, self._last_line = phase, now


def _rich_bar(bytes: bool) -> Any:
    from rich import progress
    from rich.console import Console

    amounts: tuple[Any, ...] = (progress.TaskProgressColumn(),)
    if bytes:
        amounts = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *amounts,
        progress.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )

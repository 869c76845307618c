"""Work that takes longer than a moment, on its own thread; its result is taken on the service's."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from llmos.ipc.server import Server

T = TypeVar("T")


class Background:
    """One worker thread beside a service's loop."""

    def __init__(self, server: Server) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._finished: deque[tuple[Future[Any], Callable[[Future[Any]], None]]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        server.on_readable(self._event, self._take)

    def run(self, work: Callable[[], T], done: Callable[[Future[T]], None]) -> Future[T]:
        """Run ``work`` on the thread in the order of the calls; ``done`` gets the result on the loop."""
        running = self._pool.submit(work)
        running.add_done_callback(lambda future: self._tell(future, done))
        return running

    def close(self) -> None:
        """Wait for what is running, and take nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _tell(self, future: Future[T], done: Callable[[Future[T]], None]) -> None:
        self._finished.append((future, done))
        os.eventfd_write(self._event, 1)

    def _take(self) -> None:
        os.eventfd_read(self._event)
        while self._finished:
            future, done = self._finished.popleft()
            done(future)

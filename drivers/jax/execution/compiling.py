"""Compiled programs by key: compiling them ahead, and behind what is served meanwhile."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from llmos.drivers.jax.execution.spec import Key
from llmos.ipc.errors import Canceled

HEARTBEAT_S = 0.5


class Compiled(ABC):
    """Programs by key; a missing one is compiled on first use. A load waits for the ``first`` ones."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._ready: dict[Key, Callable[..., Any]] = {}
        self._compiling: dict[Key, Future[Callable[..., Any]]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._behind: threading.Thread | None = None

    @abstractmethod
    def ahead(self) -> list[Key]:
        """Keys of all programs worth compiling, in the order in which requests are likely to need them."""

    @abstractmethod
    def _compile(self, key: Key) -> Callable[..., Any]:
        """Compile a program; on any thread."""

    def compile_ahead(self, progress: Callable[[int, int], None]) -> None:
        """Compile the first programs, and the rest behind the requests' backs.

        ``progress`` is called with (done, total) twice a second.
        """
        keys = self.ahead()
        self._compile_all(keys[: self._first], progress)
        self._compile_behind(keys[self._first :])

    def _compile_all(self, keys: list[Key], progress: Callable[[int, int], None] = lambda *_: None) -> None:
        workers = max(2, min(8, (os.cpu_count() or 2) // 2))
        with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
            pending: set[Future[Any]] = {pool.submit(self.get, key) for key in keys}
            while pending:
                progress(len(keys) - len(pending), len(keys))
                if self._closed.is_set():
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise Canceled("the model was unloaded while programs for it were compiled")
                done, pending = wait(pending, timeout=HEARTBEAT_S)
                for future in done:
                    future.result()
        progress(len(keys), len(keys))

    def _compile_behind(self, keys: list[Key]) -> None:
        """Compile in the background, after what is being compiled there."""
        self._behind = threading.Thread(
            target=self._compile_rest, args=(keys, self._behind), name="compile-rest"
        )
        self._behind.start()

    def close(self) -> None:
        """Stop compiling; what is being compiled is finished first."""
        self._closed.set()
        if self._behind is not None:
            self._behind.join()

    def get(self, key: Key) -> Callable[..., Any]:
        """The compiled program for ``key``; waits where another thread is compiling it."""
        program = self._ready.get(key)
        if program is not None:
            return program
        with self._lock:
            future = self._compiling.get(key)
            mine = future is None
            if future is None:
                future = self._compiling[key] = Future()
        if mine:
            try:
                future.set_result(self._compile(key))
            except BaseException as error:
                future.set_exception(error)
                raise
        self._ready[key] = future.result()
        return self._ready[key]

    def _compile_rest(self, keys: list[Key], after: threading.Thread | None) -> None:
        if after is not None:
            after.join()
        for key in keys:
            if self._closed.is_set():
                return
            self.get(key)

    def ready(self, key: Key) -> bool:
        """Whether a program can be had without waiting."""
        return key in self._ready

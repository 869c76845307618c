"""The compiled programs of one model: compiling them ahead, and looking them up by bucket.

Rare variants of sampling and the penalty tables are compiled when a sequence first asks for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax import platform
from llmos.drivers.jax.execution.buckets import bucket
from llmos.drivers.jax.execution.recipes import Recipes
from llmos.drivers.jax.execution.spec import FORWARD, Key, Spec, tokens_of, with_adapters
from llmos.drivers.jax.native import kernels
from llmos.ipc.errors import Canceled

HEARTBEAT_S = 0.5


class Programs:
    """Compiled programs by key; a missing one is compiled on first use."""

    def __init__(self, spec: Spec, recipes: Recipes | None = None) -> None:
        self.spec = spec
        self._recipes = recipes or Recipes(spec)
        self._ready: dict[Key, Callable[..., Any]] = {}
        self._compiling: dict[Key, Future[Callable[..., Any]]] = {}
        self._lock = threading.Lock()
        self._adapting = threading.Lock()
        self._closed = threading.Event()
        self._behind: threading.Thread | None = None

    @property
    def common(self) -> Any:
        """The sharding of what every device has."""
        return self.spec.place.common

    def compile_ahead(self, progress: Callable[[int, int], None]) -> None:
        """Compile what the first ``spec.first`` programs need, and the rest behind the requests' backs.

        ``progress`` is called with (done, total) twice a second.
        """
        keys = self.spec.ahead()
        self._compile_all(keys[: self.spec.first], progress)
        self._compile_behind(keys[self.spec.first :])

    def compile_adapted(self) -> bool:
        """Compile for adapters the forward programs that ``compile_ahead`` compiled, and the rest behind; on
        any thread. False if that was done before."""
        ahead = self.spec.ahead()
        first, rest = (
            [with_adapters(key, True) for key in keys if key[0] in FORWARD]
            for keys in (ahead[: self.spec.first], ahead[self.spec.first :])
        )
        with self._adapting:
            if all(self.ready(key) for key in first):
                return False
            self._compile_all(first)
            self._compile_behind(rest)
            return True

    @property
    def adapting(self) -> bool:
        """Whether ``compile_adapted`` is at work."""
        return self._adapting.locked()

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

    def decode(self, rows: int, adapters: bool) -> tuple[int, Callable[..., Any]]:
        """The batch size that holds ``rows`` and its decode program."""
        size = bucket(rows, self.spec.decode_sizes)
        return size, self.get(with_adapters(("decode", size), adapters))

    def microbatches(self, rows: list[int]) -> list[list[int]]:
        """The rows of a decode step as programs take them: one after another, in one piece on one device."""
        return [rows] if rows else []

    def place_rows(self, rows: np.ndarray) -> Any:
        """Slot numbers [B] as the programs take them."""
        return jax.device_put(rows, self.common)

    def prefill(self, rows: int, size: int, fresh: bool, adapters: bool) -> tuple[int, Callable[..., Any]]:
        """The number of rows that holds ``rows`` and the prefill program for chunks of ``size``."""
        height = bucket(rows, self.spec.rows_for(size))
        key = ("prefill", height, size, fresh and self.spec.shape.backend.knows_fresh)
        return height, self.get(with_adapters(key, adapters))

    def mixed(self, rows: int, pieces: int) -> tuple[int, int, Callable[..., Any]] | None:
        """The sizes that hold so many rows and pieces and the program that does both, if there is one."""
        sizes, heights = self.spec.mixed
        if not sizes or rows > sizes[-1] or pieces > heights[-1]:
            return None
        size, height = bucket(rows, sizes), bucket(pieces, heights)
        return size, height, self.get(("mixed", size, height))

    def _compile(self, key: Key) -> Callable[..., Any]:
        function, donated, arguments = self._recipes.describe(key)
        options = platform.compiler_options(self.spec.place.device, tokens_of(key))
        with kernels.use(self.spec.shape.native):
            return self.spec.place.compile(function, donated, arguments, self._recipes.outputs(key), options)

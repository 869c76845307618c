"""The compiled programs of one model, looked up by bucket.

Rare variants of sampling and the penalty tables are compiled when a sequence first asks for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax import platform
from llmos.drivers.jax.execution.buckets import bucket
from llmos.drivers.jax.execution.compiling import Compiled
from llmos.drivers.jax.execution.recipes import Recipes
from llmos.drivers.jax.execution.spec import FORWARD, Key, Spec, tokens_of, with_adapters
from llmos.drivers.jax.native import kernels


class Programs(Compiled):
    """Those of ``spec``."""

    def __init__(self, spec: Spec, recipes: Recipes | None = None) -> None:
        super().__init__(spec.first)
        self.spec = spec
        self._recipes = recipes or Recipes(spec)
        self._adapting = threading.Lock()

    def ahead(self) -> list[Key]:
        return self.spec.ahead()

    @property
    def common(self) -> Any:
        """The sharding of what every device has."""
        return self.spec.place.common

    def compile_adapted(self) -> bool:
        """Compile for adapters the forward programs that ``compile_ahead`` compiled, and the rest behind; on
        any thread. False if that was done before."""
        ahead = self.ahead()
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

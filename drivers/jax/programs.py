"""The compiled programs of one model: which exist, compiling them ahead, and looking them up by bucket.

The expensive programs are the forward passes: one per decode batch size and one per chunk length, for any
context length. Sampling is a program of its own per batch size and variant, so that the two do not
multiply; the rare variants and the penalty tables are compiled when a sequence first asks for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax import forward, sampling, state
from llmos.drivers.jax.buckets import bucket
from llmos.drivers.jax.forward import Shape
from llmos.drivers.jax.modules import struct
from llmos.drivers.jax.sampling import Variant
from llmos.drivers.sdk.checks import BIAS_LIMIT

ADMIT_ROWS = 8
GROW_ROWS = 64
SCRUB_PAGES = 64
HEARTBEAT_S = 0.5

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Spec:
    """Shapes of everything that the programs take, as ``jax.ShapeDtypeStruct`` trees."""

    shape: Shape
    weights: Any
    caches: Any
    batch: state.BatchState
    vocab: int
    max_context: int
    decode_sizes: list[int]
    chunk_sizes: list[int]
    prefill_rows: list[int]


class Programs:
    """Compiled programs by key; a missing one is compiled on first use."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._ready: dict[Key, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def ahead(self) -> list[Key]:
        """Keys of the programs worth compiling at load, the most expensive first."""
        spec = self.spec
        keys: list[Key] = [("decode", size) for size in reversed(spec.decode_sizes)]
        for size in reversed(spec.chunk_sizes):
            fresh = spec.shape.backend.knows_fresh
            keys += [("prefill", rows, size, fresh) for rows in self.rows_for(size)]
        sizes = sorted({*spec.prefill_rows, *spec.decode_sizes})
        for variant in ("greedy", "plain", "filtered"):
            keys += [("sample", variant, size) for size in sizes]
        return [*keys, ("admit",), ("grow",)]

    def compile_ahead(self, progress: Callable[[int, int], None]) -> None:
        """Compile everything in ``ahead``; ``progress`` is called with (done, total) twice a second."""
        keys = self.ahead()
        workers = max(2, min(8, (os.cpu_count() or 2) // 2))
        with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
            pending: set[Future[Any]] = {pool.submit(self.get, key) for key in keys}
            while pending:
                progress(len(keys) - len(pending), len(keys))
                done, pending = wait(pending, timeout=HEARTBEAT_S)
                for future in done:
                    future.result()
        progress(len(keys), len(keys))

    def get(self, key: Key) -> Callable[..., Any]:
        """The compiled program for ``key``."""
        program = self._ready.get(key)
        if program is None:
            program = self._compile(key)
            with self._lock:
                self._ready[key] = program
        return program

    def decode(self, rows: int) -> tuple[int, Callable[..., Any]]:
        """The batch size that holds ``rows`` and its decode program."""
        size = bucket(rows, self.spec.decode_sizes)
        return size, self.get(("decode", size))

    def rows_for(self, size: int) -> list[int]:
        """How many rows prefill programs of this chunk length come with: together no more than a chunk."""
        return [
            rows for rows in self.spec.prefill_rows if rows == 1 or rows * size <= self.spec.chunk_sizes[-1]
        ]

    def prefill(self, rows: int, size: int, fresh: bool) -> tuple[int, Callable[..., Any]]:
        """The number of rows that holds ``rows`` and the prefill program for chunks of ``size``."""
        height = bucket(rows, self.rows_for(size))
        return height, self.get(("prefill", height, size, fresh and self.spec.shape.backend.knows_fresh))

    def _compile(self, key: Key) -> Callable[..., Any]:
        function, donated, arguments = self._describe(key)
        return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()

    def _describe(self, key: Key) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]:
        """The function of a program, which arguments it donates, and their shapes."""
        spec = self.spec
        match key:
            case ("decode", int(size)):
                return (
                    partial(forward.decode, spec.shape),
                    (1,),
                    (spec.weights, spec.caches, spec.batch, _ints(size)),
                )
            case ("prefill", int(rows), int(size), bool(fresh)):
                chunk = (_ints(rows), _ints(rows, size + 2))
                arguments = (spec.weights, spec.caches, spec.batch, *chunk)
                return partial(forward.prefill, spec.shape, fresh), (1,), arguments
            case ("sample", "full", int(size)):
                full = (self._logits(size), _ints(size), spec.batch, self._tallies())
                return partial(sampling.sample, "full"), (2, 3), full
            case ("sample", str(variant), int(size)):
                lean: Callable[..., Any] = partial(sampling.sample, cast(Variant, variant), tallies=None)
                return lean, (2,), (self._logits(size), _ints(size), spec.batch)
            case ("admit",):
                return state.admit, (0,), (spec.batch, *self._admission())
            case ("grow",):
                return state.grow, (0,), (spec.batch, *(_ints(GROW_ROWS) for _ in range(3)))
            case ("tally",):
                bias = (_ints(BIAS_LIMIT), struct((BIAS_LIMIT,), jnp.float32))
                tokens = (_ints(), _ints(spec.max_context), _ints(), _ints())
                return state.tally, (0,), (self._tallies(), *tokens, *bias)
            case ("scrub",):
                return self._scrub, (0,), (spec.caches, _ints(SCRUB_PAGES))
        raise KeyError(key)

    def _scrub(self, caches: list[Any], pages: jax.Array) -> list[Any]:
        return [self.spec.shape.backend.scrub(cache, pages) for cache in caches]

    def _logits(self, rows: int) -> Any:
        return struct((rows, self.spec.vocab), jnp.float32)

    def _tallies(self) -> Any:
        slots = self.spec.batch.token.shape[0] - 1
        return jax.eval_shape(lambda: state.empty_tallies(slots, self.spec.vocab))

    def _admission(self) -> tuple[Any, Any]:
        width = self.spec.batch.tables.shape[1]
        packed = state.pack_admission([], ADMIT_ROWS, 0, [[0] * width] * ADMIT_ROWS)
        return jax.eval_shape(lambda: packed)  # type: ignore[no-any-return]


def _ints(*shape: int) -> Any:
    return struct(shape, np.int32)

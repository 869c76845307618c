"""The compiled programs of one model: which exist, compiling them ahead, and looking them up by bucket.

The expensive programs are the forward passes: one per decode batch size and one per chunk length, for any
context length. Sampling is a program of its own per batch size and variant, so that the two do not
multiply; the rare variants and the penalty tables are compiled when a sequence first asks for them.

A model with room for adapters has each forward program twice: the plain one, which is that of a model without
room and serves steps in which no row has an adapter, and an adapted one, whose key begins with "adapted".
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax import platform
from llmos.drivers.jax.adapters import adapters
from llmos.drivers.jax.attention.shared import SharedCaches
from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.execution.buckets import bucket
from llmos.drivers.jax.native import kernels
from llmos.drivers.jax.paging import pages
from llmos.drivers.jax.sampling import sampling
from llmos.drivers.jax.sampling.sampling import Variant
from llmos.drivers.jax.sharding.placement import Placement
from llmos.drivers.jax.speculation import drafting, verification
from llmos.drivers.sdk.checks import BIAS_LIMIT
from llmos.ipc.errors import Canceled

ADMIT_ROWS = 8
GROW_ROWS = 64
PIECE = 16  # tokens of a prompt that are one row of a mixed program
SCRUB_PAGES = 64
HEARTBEAT_S = 0.5

Key = tuple[str | int, ...]

ADAPTED = "adapted"
_FORWARD = ("decode", "prefill", "verify")


@dataclass(frozen=True)
class Speculating:
    """That decode steps can verify ``tokens`` guesses, in batches of ``sizes``; shapes as in ``Spec``.

    ``draft`` is what specialises the draft model's programs, its weights and its caches, if there is one.
    """

    tokens: int
    sizes: list[int]
    history: Any
    draft: tuple[Shape, Any, Any] | None = None


@dataclass(frozen=True)
class Spec:
    """Shapes of everything that the programs take, as ``jax.ShapeDtypeStruct`` trees.

    ``chunk_tokens`` bounds the prompt tokens of one prefill program over all its rows; ``first`` is how many
    programs are compiled before a model counts as loaded; ``move_sizes`` how many pages are moved at once.
    ``mixed`` are the numbers of rows that decode, and of pieces of prompts, in programs that do both.
    ``room`` is that for adapters, if there is any; ``shape`` is that of the plain programs.
    """

    shape: Shape
    place: Placement
    weights: Any
    caches: Any
    batch: state.BatchState
    vocab: int
    max_context: int
    decode_sizes: list[int]
    chunk_tokens: int
    chunk_sizes: list[int]
    prefill_rows: list[int]
    first: int
    mixed: tuple[list[int], list[int]] = ([], [])
    move_sizes: tuple[int, ...] = ()
    speculating: Speculating | None = None
    room: adapters.Room | None = None

    @property
    def least_chunk(self) -> int:
        """The tokens of the smallest program for prompts; 0 where those that decode take a few along."""
        return 0 if self.mixed[0] else self.chunk_sizes[0]


class Programs:
    """Compiled programs by key; a missing one is compiled on first use."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._ready: dict[Key, Callable[..., Any]] = {}
        self._compiling: dict[Key, Future[Callable[..., Any]]] = {}
        self._lock = threading.Lock()
        self._adapting = threading.Lock()
        self._closed = threading.Event()
        self._behind: threading.Thread | None = None

    def ahead(self) -> list[Key]:
        """Keys of all programs worth compiling, in the order in which requests are likely to need them."""
        spec = self.spec
        known = [True, False] if spec.shape.backend.knows_fresh else [False]
        sizes = sorted({*spec.prefill_rows, *spec.decode_sizes, *spec.mixed[1]})
        stepping = self._stepping()
        keys: list[Key] = [("admit",), ("grow",), *stepping[: 3 if spec.speculating else 1]]
        keys += [("prefill", 1, size, known[0]) for size in spec.chunk_sizes]
        keys += [("sample", variant, 1) for variant in ("greedy", "filtered", "plain")]
        keys += stepping
        keys += [("sample", variant, size) for size in sizes for variant in ("greedy", "filtered", "plain")]
        keys += [
            ("prefill", r, s, fresh) for fresh in known for s in spec.chunk_sizes for r in self.rows_for(s)
        ]
        keys += [("mixed", rows, pieces) for rows in spec.mixed[0] for pieces in spec.mixed[1]]
        keys += [(way, size) for size in spec.move_sizes for way in ("gather", "scatter")]
        keys += [("adapt",)] if spec.room else []
        return list(dict.fromkeys(keys))

    def adapted(self) -> list[Key]:
        """Those for rows with adapters, which are not compiled before there is one."""
        return [with_adapters(key, True) for key in self.ahead() if key[0] in _FORWARD]

    def _stepping(self) -> list[Key]:
        """Keys of the programs that decode."""
        sizes, speculating = self.spec.decode_sizes, self.spec.speculating
        if speculating is None:
            return [("decode", size) for size in sizes]
        keys: list[Key] = [("recall", 1), ("verify", sizes[0], 0), ("accept", "greedy", sizes[0], 0)]
        kinds = [(size, guesses) for guesses in (0, speculating.tokens) for size in sizes]
        kinds = [(s, k) for s, k in kinds if not k or s in speculating.sizes]
        for variant in ("greedy", "filtered", "plain"):
            keys += [key for s, k in kinds for key in (("verify", s, k), ("accept", variant, s, k))]
        return keys

    def compile_ahead(self, progress: Callable[[int, int], None]) -> None:
        """Compile what ``spec.first`` programs of ``ahead`` need, and the rest behind the requests' backs.

        ``progress`` is called with (done, total) twice a second.
        """
        keys = self.ahead()
        self._compile_all(keys[: self.spec.first], progress)
        self._compile_behind(keys[self.spec.first :])

    def compile_adapted(self) -> bool:
        """Compile for adapters the forward programs that ``compile_ahead`` compiled, and the rest behind; on
        any thread. False if that was done before."""
        ahead = self.ahead()
        first, rest = (
            [with_adapters(key, True) for key in keys if key[0] in _FORWARD]
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
        return jax.device_put(rows, self.spec.place.common)

    def rows_for(self, size: int) -> list[int]:
        """How many rows prefill programs of this chunk length come with: together no more than a chunk."""
        return [rows for rows in self.spec.prefill_rows if rows == 1 or rows * size <= self.spec.chunk_tokens]

    def prefill(self, rows: int, size: int, fresh: bool, adapters: bool) -> tuple[int, Callable[..., Any]]:
        """The number of rows that holds ``rows`` and the prefill program for chunks of ``size``."""
        height = bucket(rows, self.rows_for(size))
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
        function, donated, arguments = self._describe(key)
        options = platform.compiler_options(self.spec.place.device, _tokens(key))
        with kernels.use(self.spec.shape.native):
            return self.spec.place.compile(function, donated, arguments, self._outputs(key), options)

    def _outputs(self, key: Key) -> Any:
        """For each output of a program how it is laid out; see ``Placement.compile``."""
        match plain(key):
            case ("decode" | "prefill", int(rows), *_):
                return 1, self._logits(rows)
            case ("mixed", int(rows), int(pieces)):
                return 1, self._logits(rows), self._logits(pieces)
            case ("verify", int(rows), int(guesses)):
                caches = (1, 6) if self._draft(key) else (1,)
                return *caches, self._logits(rows, guesses + 1), None
            case ("scrub" | "scatter", _):
                return 0
        return None

    def _draft(self, key: Key) -> tuple[Shape, Any, Any] | None:
        """The draft model that a verifying program asks, if it does."""
        speculating = self.spec.speculating
        return speculating.draft if speculating is not None and key[2] else None

    def _describe(self, key: Key) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]:
        """The function of a program, which arguments it donates, and their shapes."""
        spec = self.spec
        shape, weights = self._model(key)
        match plain(key):
            case ("decode", int(size)):
                decode = partial(forward.decode, shape)
                return decode, (1,), (weights, spec.caches, spec.batch, _ints(size))
            case ("prefill", int(rows), int(size), bool(fresh)):
                width = spec.batch.tables.shape[1]
                chunk = _ints(rows, forward.heading(shape.adapters) + width + size)
                prefill = partial(forward.prefill, shape, fresh, width)
                return prefill, (1,), (weights, spec.caches, chunk)
            case ("mixed", int(size), int(pieces)):
                width = spec.batch.tables.shape[1]
                chunk = _ints(pieces, forward.heading(adapters=False) + width + PIECE)
                held = (weights, spec.caches, spec.batch)
                return partial(forward.mixed, shape, width), (1,), (*held, _ints(size), chunk)
            case ("sample", "full", int(size)):
                full = (self._logits(size), _ints(size), spec.batch, self._tallies())
                return partial(sampling.sample, "full", spec.shape.vocabulary), (2, 3), full
            case ("sample", str(variant), int(size)):
                known = (cast(Variant, variant), spec.shape.vocabulary)
                lean: Callable[..., Any] = partial(sampling.sample, *known, tallies=None)
                return lean, (2,), (self._logits(size), _ints(size), spec.batch)
            case ("verify", int(size), int(guesses)):
                return self._describe_verify(key, size, guesses)
            case ("accept", str(variant), int(size), int(guesses)):
                return self._describe_accept(cast(Variant, variant), size, guesses)
            case ("recall", int(rows)):
                tokens = _ints(rows, spec.max_context)
                return verification.recall, (0,), (self._history(), _ints(rows), tokens)
            case ("admit",):
                return state.admit, (0,), (spec.batch, *self._admission())
            case ("grow",):
                return state.grow, (0,), (spec.batch, *(_ints(GROW_ROWS) for _ in range(3)))
            case ("tally",):
                bias = (_ints(BIAS_LIMIT), struct((BIAS_LIMIT,), jnp.float32))
                tokens = (_ints(), _ints(spec.max_context), _ints(), _ints())
                return state.tally, (0,), (self._tallies(), *tokens, *bias)
            case ("adapt",):
                assert spec.room is not None
                stacks = [(spec.weights[a], spec.weights[b]) for a, b in spec.room.places]
                return adapters.put, (0,), (stacks, adapters.pairs(stacks), _ints())
            case ("scrub",):
                return self._scrub, (0,), (spec.caches, _ints(SCRUB_PAGES))
            case ("gather", int(size)):
                return pages.gather, (), (spec.caches, _ints(size))
            case ("scatter", int(size)):
                return pages.scatter, (0,), (spec.caches, (pages.row(spec.caches),) * size, _ints(size))
        raise KeyError(key)

    def _model(self, key: Key) -> tuple[Shape, list[Any]]:
        """What specialises a forward program, and the shapes of the weights that it takes."""
        spec, room = self.spec, self.spec.room
        if room is None:
            return spec.shape, spec.weights
        if key[0] != ADAPTED:
            return spec.shape, room.without(spec.weights)
        graph, tree = room.decoder
        return replace(spec.shape, graph=graph, tree=tree, adapters=True), spec.weights

    def _describe_verify(
        self, key: Key, size: int, guesses: int
    ) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]:
        spec = self.spec
        shape, weights = self._model(key)
        arguments = (weights, spec.caches, spec.batch, self._history(), _ints(size))
        draft = self._draft(("verify", size, guesses))
        if draft is None:
            return partial(verification.step, shape, guesses), (1,), arguments
        guesser, *held = draft
        return partial(drafting.step, shape, guesser, guesses), (1, 6), (*arguments, *held)

    def _describe_accept(
        self, variant: Variant, size: int, guesses: int
    ) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]:
        logits, accept = self._logits(size, guesses + 1), verification.accept
        columns = self.spec.shape.vocabulary
        guess = verification.Guess(_ints(size, max(guesses, 1)), _ints(size), struct((size,), bool))
        arguments = (logits, guess, _ints(size), self.spec.batch, self._history())
        if variant == "full":
            return partial(accept, variant, columns), (3, 4, 5), (*arguments, self._tallies())
        return partial(accept, variant, columns, tallies=None), (3, 4), arguments

    def _history(self) -> Any:
        assert self.spec.speculating is not None
        return self.spec.speculating.history

    def _scrub(self, caches: Any, pages: jax.Array) -> Any:
        if isinstance(caches, SharedCaches):
            return caches.scrubbed(pages)
        return [self.spec.shape.backend.scrub(cache, pages) for cache in caches]

    def _logits(self, *rows: int) -> Any:
        return self.spec.place.logits(*rows, self.spec.vocab)

    def _tallies(self) -> Any:
        slots = self.spec.batch.token.shape[0] - 1
        return jax.eval_shape(lambda: state.empty_tallies(slots, self.spec.vocab))

    def _admission(self) -> tuple[Any, Any]:
        width = self.spec.batch.tables.shape[1]
        own: list[int] | None = [] if self.spec.room else None
        packed = state.pack_admission([], ADMIT_ROWS, 0, [[0] * width] * ADMIT_ROWS, own)
        return jax.eval_shape(lambda: packed)  # type: ignore[no-any-return]


def with_adapters(key: Key, adapters: bool) -> Key:
    """The key of a forward program for rows of which some have ``adapters``, or none has."""
    return (ADAPTED, *key) if adapters else key


def plain(key: Key) -> Key:
    """The key of the program that does the same for rows without adapters."""
    return key[1:] if key[0] == ADAPTED else key


def _tokens(key: Key) -> int:
    """How many tokens a program takes through the model's products; 0 of one that has none."""
    match plain(key):
        case ("decode", int(size)):
            return size
        case ("prefill", int(rows), int(size), _):
            return rows * size
        case ("mixed", int(size), int(pieces)):
            return size + pieces * PIECE
        case ("verify", int(size), int(guesses)):
            return size * (guesses + 1)
    return 0


def _ints(*shape: int) -> Any:
    return struct(shape, np.int32)

"""What each program is: the function that is compiled, what it takes, and where its results lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.adapters import adapters
from llmos.drivers.jax.attention.shared import SharedCaches
from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.execution.spec import (
    ADAPTED,
    ADMIT_ROWS,
    GROW_ROWS,
    PIECE,
    SCRUB_PAGES,
    Key,
    Spec,
    plain,
)
from llmos.drivers.jax.paging import pages
from llmos.drivers.jax.sampling import sampling
from llmos.drivers.jax.sampling.sampling import Variant
from llmos.drivers.jax.speculation import drafting, verification
from llmos.drivers.sdk.checks import BIAS_LIMIT


class Recipes:
    """Those of a model's programs, by key."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def outputs(self, key: Key) -> Any:
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

    def describe(self, key: Key) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]:
        """The function of a program, which arguments it donates, and their shapes."""
        spec = self.spec
        shape, weights = self._model(key)
        match plain(key):
            case ("decode", int(size)):
                decode = partial(forward.decode, shape)
                return decode, (1,), (weights, spec.caches, spec.batch, ints(size))
            case ("prefill", int(rows), int(size), bool(fresh)):
                width = spec.batch.tables.shape[1]
                chunk = ints(rows, forward.heading(shape.adapters) + width + size)
                prefill = partial(forward.prefill, shape, fresh, width)
                return prefill, (1,), (weights, spec.caches, chunk)
            case ("mixed", int(size), int(pieces)):
                width = spec.batch.tables.shape[1]
                chunk = ints(pieces, forward.heading(adapters=False) + width + PIECE)
                held = (weights, spec.caches, spec.batch)
                return partial(forward.mixed, shape, width), (1,), (*held, ints(size), chunk)
            case ("sample", "full", int(size)):
                full = (self._logits(size), ints(size), spec.batch, self._tallies())
                return partial(sampling.sample, "full", spec.shape.vocabulary), (2, 3), full
            case ("sample", str(variant), int(size)):
                known = (cast(Variant, variant), spec.shape.vocabulary)
                lean: Callable[..., Any] = partial(sampling.sample, *known, tallies=None)
                return lean, (2,), (self._logits(size), ints(size), spec.batch)
            case ("verify", int(size), int(guesses)):
                return self._describe_verify(key, size, guesses)
            case ("accept", str(variant), int(size), int(guesses)):
                return self._describe_accept(cast(Variant, variant), size, guesses)
            case ("recall", int(rows)):
                tokens = ints(rows, spec.max_context)
                return verification.recall, (0,), (self._history(), ints(rows), tokens)
            case ("admit",):
                return state.admit, (0,), (spec.batch, *self._admission())
            case ("grow",):
                return state.grow, (0,), (spec.batch, *(ints(GROW_ROWS) for _ in range(3)))
            case ("tally",):
                bias = (ints(BIAS_LIMIT), struct((BIAS_LIMIT,), jnp.float32))
                tokens = (ints(), ints(spec.max_context), ints(), ints())
                return state.tally, (0,), (self._tallies(), *tokens, *bias)
            case ("adapt",):
                assert spec.room is not None
                stacks = [(spec.weights[a], spec.weights[b]) for a, b in spec.room.places]
                return adapters.put, (0,), (stacks, adapters.pairs(stacks), ints())
            case ("scrub",):
                return self._scrub, (0,), (spec.caches, ints(SCRUB_PAGES))
            case ("gather", int(size)):
                return pages.gather, (), (spec.caches, ints(size))
            case ("scatter", int(size)):
                return pages.scatter, (0,), (spec.caches, (pages.row(spec.caches),) * size, ints(size))
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
        arguments = (weights, spec.caches, spec.batch, self._history(), ints(size))
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
        guess = verification.Guess(ints(size, max(guesses, 1)), ints(size), struct((size,), bool))
        arguments = (logits, guess, ints(size), self.spec.batch, self._history())
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


def ints(*shape: int) -> Any:
    """The shape of an array of int32."""
    return struct(shape, np.int32)

"""Running a program once on rows that hold no sequence, so that no request is the first to run it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax.execution import packing
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.execution.spec import ADAPTED, PIECE, Key, plain
from llmos.drivers.jax.speculation.speculating import Speculation
from llmos.drivers.jax.speculation.verification import no_guess


def rehearse(replica: Replica, key: Key) -> None:
    """Run the program of a key, if it is one that steps or moves need, and wait."""
    program, weights = replica.programs.get(key), replica.weights_for(key[0] == ADAPTED)
    spare, limits = partial(replica.row_index, []), replica.limits
    match plain(key):
        case ("decode", int(size)):
            replica.caches, _ = program(weights, replica.caches, replica.batch, spare(size))
        case ("prefill", int(height), int(size), bool()):
            chunk = packing.chunk([], {}, limits, (height, replica.width, size), key[0] == ADAPTED)
            replica.caches, _ = program(weights, replica.caches, chunk)
        case ("mixed", int(size), int(height)):
            chunk = packing.chunk([], {}, limits, (height, replica.width, PIECE), adapters=False)
            replica.caches, *_ = program(weights, replica.caches, replica.batch, spare(size), chunk)
        case ("sample", "greedy" | "plain" | "filtered", int(size)):
            logits = _zeros(replica, size)
            replica.batch, *_ = program(logits, spare(size), replica.batch)
        case ("gather" | "scatter", int(size)) if size <= limits.pages:
            # What is written back is what is there.
            numbers = list(range(size))
            replica.write_pages(numbers, replica.read_pages(numbers))
        case ("verify", int(size), int(guesses)) if replica.speculation is not None:
            held = (weights, replica.caches, replica.batch, replica.speculation.history, spare(size))
            replica.caches, *_ = replica.speculation.verify(program, guesses, held)
        case ("accept", str(variant), int(size), int(guesses)) if replica.speculation is not None:
            if variant != "full":
                _accept(replica, replica.speculation, program, size, guesses)
    jax.block_until_ready((replica.caches, replica.batch))  # type: ignore[no-untyped-call]


def _accept(replica: Replica, speculation: Speculation, program: Any, size: int, guesses: int) -> None:
    logits = _zeros(replica, size, guesses + 1)
    guess = jax.device_put(no_guess(size, guesses), replica.common)
    rest = (replica.row_index([], size), replica.batch, speculation.history)
    replica.batch, speculation.history, *_ = program(logits, guess, *rest)


def _zeros(replica: Replica, *rows: int) -> jax.Array:
    """Logits [*rows, vocab] that say nothing."""
    shape = replica.programs.spec.place.logits(*rows, replica.limits.vocab_size)
    zeros: jax.Array = jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)
    return zeros

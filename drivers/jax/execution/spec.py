"""What a model's programs are made for, and which there are: each has a key, its kind and its sizes.

The expensive programs are the forward passes: one per decode batch size and one per chunk length, for any
context length. Sampling is a program of its own per batch size and variant, so that the two do not multiply.

A model with room for adapters has each forward program twice: the plain one, which is that of a model without
room and serves steps in which no row has an adapter, and an adapted one, whose key begins with "adapted".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.drivers.jax.adapters import adapters
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution import state
from llmos.drivers.jax.sharding.placement import Placement

ADMIT_ROWS = 8
GROW_ROWS = 64
PIECE = 16  # tokens of a prompt that are one row of a mixed program
SCRUB_PAGES = 64

Key = tuple[str | int, ...]

ADAPTED = "adapted"
FORWARD = ("decode", "prefill", "verify")


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

    def rows_for(self, size: int) -> list[int]:
        """How many rows prefill programs of this chunk length come with: together no more than a chunk."""
        return [rows for rows in self.prefill_rows if rows == 1 or rows * size <= self.chunk_tokens]

    def ahead(self) -> list[Key]:
        """Keys of all programs worth compiling, in the order in which requests are likely to need them."""
        known = [True, False] if self.shape.backend.knows_fresh else [False]
        sizes = sorted({*self.prefill_rows, *self.decode_sizes, *self.mixed[1]})
        stepping = self._stepping()
        keys: list[Key] = [("admit",), ("grow",), *stepping[: 3 if self.speculating else 1]]
        keys += [("prefill", 1, size, known[0]) for size in self.chunk_sizes]
        keys += [("sample", variant, 1) for variant in ("greedy", "filtered", "plain")]
        keys += stepping
        keys += [("sample", variant, size) for size in sizes for variant in ("greedy", "filtered", "plain")]
        keys += [
            ("prefill", r, s, fresh) for fresh in known for s in self.chunk_sizes for r in self.rows_for(s)
        ]
        keys += [("mixed", rows, pieces) for rows in self.mixed[0] for pieces in self.mixed[1]]
        keys += [(way, size) for size in self.move_sizes for way in ("gather", "scatter")]
        keys += [("adapt",)] if self.room else []
        return list(dict.fromkeys(keys))

    def adapted(self) -> list[Key]:
        """Those for rows with adapters, which are not compiled before there is one."""
        return [with_adapters(key, True) for key in self.ahead() if key[0] in FORWARD]

    def _stepping(self) -> list[Key]:
        """Keys of the programs that decode."""
        sizes, speculating = self.decode_sizes, self.speculating
        if speculating is None:
            return [("decode", size) for size in sizes]
        keys: list[Key] = [("recall", 1), ("verify", sizes[0], 0), ("accept", "greedy", sizes[0], 0)]
        kinds = [(size, guesses) for guesses in (0, speculating.tokens) for size in sizes]
        kinds = [(s, k) for s, k in kinds if not k or s in speculating.sizes]
        for variant in ("greedy", "filtered", "plain"):
            keys += [key for s, k in kinds for key in (("verify", s, k), ("accept", variant, s, k))]
        return keys


def with_adapters(key: Key, adapters: bool) -> Key:
    """The key of a forward program for rows of which some have ``adapters``, or none has."""
    return (ADAPTED, *key) if adapters else key


def plain(key: Key) -> Key:
    """The key of the program that does the same for rows without adapters."""
    return key[1:] if key[0] == ADAPTED else key


def tokens_of(key: Key) -> int:
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

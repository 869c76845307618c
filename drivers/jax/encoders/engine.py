"""One loaded encoder: its weights, its compiled programs by bucket, and the dispatch of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos.drivers.jax import platform
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.encoders.encoder import EncoderConfig
from llmos.drivers.jax.execution.buckets import bucket, decode_buckets, split
from llmos.drivers.jax.execution.compiling import Compiled
from llmos.drivers.jax.execution.spec import Key
from llmos.drivers.sdk.driver import Pending, PendingEncoding
from llmos.drivers.sdk.messages import EncodedStep, EncodeStep
from llmos.ipc.errors import InvalidArgument, IOFailure

SHORTEST = 16


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder's programs are specialised on: its module (``graph`` and ``tree``, as in ``forward``),
    the shapes of its ``weights``, and the buckets. ``first`` is how many are compiled ahead of serving. A
    call of fewer than ``least`` tokens takes as long as one of so many, so texts are not cut into such."""

    graph: Any
    tree: Any
    weights: list[Any]
    lengths: list[int]
    step_tokens: int
    first: int
    least: int

    def rows_for(self, length: int) -> list[int]:
        """Batch sizes for texts of a length, together no more than a step."""
        return decode_buckets(max(1, self.step_tokens // length))

    def calls(self, texts: int, length: int, sizes: list[int]) -> list[tuple[int, int]]:
        """How many ``texts`` each call takes, and which of the ``sizes`` holds these."""
        worth = [rows for rows in sizes if rows * length >= self.least] or sizes[-1:]
        return [(count, bucket(count, sizes)) for count in split(texts, worth)]


def length_buckets(longest: int) -> list[int]:
    """Lengths that texts are padded to: powers of two, and the longest itself."""
    sizes, size = [], SHORTEST
    while size < longest:
        sizes.append(size)
        size *= 2
    return [*sizes, longest]


class EncoderPrograms(Compiled):
    """Compiled programs by (rows, length)."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec.first)
        self.encoder = spec

    def ahead(self) -> list[Key]:
        """All: first those for one text and for most texts, with which ``ready_rows`` makes do."""
        sizes = {length: self.encoder.rows_for(length) for length in self.encoder.lengths}
        alone: list[Key] = [("encode", 1, length) for length in sizes]
        most: list[Key] = [("encode", rows[-1], length) for length, rows in sizes.items()]
        rest: list[Key] = [("encode", n, length) for length, rows in sizes.items() for n in reversed(rows)]
        return list(dict.fromkeys([*alone, *most, *rest]))

    def ready_rows(self, length: int) -> list[int]:
        """The batch sizes to use now: those compiled already, so that nobody waits for a compiler while
        there is another way; all of them where none is."""
        sizes = self.encoder.rows_for(length)
        return [rows for rows in sizes if self.ready(("encode", rows, length))] or sizes

    def _compile(self, key: Key) -> Callable[..., Any]:
        rows, length = (int(side) for side in key[1:])
        packed = struct((rows, 2 * length + 1), np.int32)
        (device,) = self.encoder.weights[0].sharding.device_set
        # Triton's kernels for the one program of few tokens would take long to try.
        options = platform.compiler_options(device, max(rows * length, platform.FEW_TOKENS + 1))
        return jax.jit(partial(_run, self.encoder)).lower(self.encoder.weights, packed).compile(options)


def _run(spec: EncoderSpec, weights: list[Any], packed: jax.Array) -> jax.Array:
    """``packed`` [rows, 2 L + 1] holds tokens, their types, and how many count -> float32 [rows, width]."""
    encoder = nnx.merge(spec.graph, jax.tree.unflatten(spec.tree, weights))
    length = packed.shape[1] // 2
    made: jax.Array = encoder(packed[:, :length], packed[:, length:-1], packed[:, -1])
    return made.astype(jnp.float32)


class EncoderEngine:
    """Encodes texts; see ``Driver.encode`` for the contract."""

    def __init__(
        self,
        config: EncoderConfig,
        programs: EncoderPrograms,
        weights: list[jax.Array],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._programs = programs
        self.weights = weights
        self.state: list[jax.Array] = []
        self._clock = clock
        self._completed = 0.0

    def encode(self, request: EncodeStep) -> PendingEncoding:
        """Check and dispatch a step; InvalidArgument says what does not fit."""
        spec = self._programs.encoder
        _check(self._config, spec, request)
        begun = self._clock()
        length = bucket(max(map(len, request.texts)), spec.lengths)
        types = request.types or [[]] * len(request.texts)
        outputs, at, computed = [], 0, 0
        for count, rows in spec.calls(len(request.texts), length, self._programs.ready_rows(length)):
            packed = _pack(request.texts[at : at + count], types[at : at + count], rows, length)
            made = self._programs.get(("encode", rows, length))(self.weights, packed)
            made.copy_to_host_async()
            outputs.append((count, made))
            at, computed = at + count, computed + rows * length
        ready = lambda: all(made.is_ready() for _, made in outputs)  # noqa: E731
        return Pending(partial(self._resolve, outputs, computed, begun), ready)

    def put_down(self, weights: list[jax.Array]) -> None:
        """See ``parking.Parkable``."""
        self.weights = weights

    def renew(self) -> None:
        """See ``parking.Parkable``: there is nothing but weights."""

    def take_up(self, weights: list[jax.Array], state: None) -> None:
        """See ``parking.Parkable``."""
        self.weights = weights

    def close(self) -> None:
        """Stop what still runs in the background."""
        self._programs.close()

    def _resolve(self, outputs: list[tuple[int, jax.Array]], computed: int, begun: float) -> EncodedStep:
        rows = np.concatenate([np.asarray(made)[:count] for count, made in outputs])
        now = self._clock()
        since, self._completed = max(begun, self._completed), now
        if not np.isfinite(rows).all():
            raise IOFailure("the device made numbers that are not finite of these texts")
        micros = round((now - since) * 1e6)
        return EncodedStep(rows.astype("<f4").tobytes(), rows.shape[1], micros, computed)


def _pack(texts: list[list[int]], types: list[list[int]], rows: int, length: int) -> np.ndarray:
    packed = np.zeros((rows, 2 * length + 1), np.int32)
    for row, (text, kinds) in enumerate(zip(texts, types, strict=True)):
        packed[row, : len(text)] = text
        packed[row, length : length + len(kinds)] = kinds
        packed[row, -1] = len(text)
    return packed


def _check(config: EncoderConfig, spec: EncoderSpec, request: EncodeStep) -> None:
    """Refuse a step that names a token or type that is not there, or exceeds a step, before any effect."""
    if not request.texts or (request.types and len(request.types) != len(request.texts)):
        raise InvalidArgument(f"{len(request.texts)} texts with {len(request.types)} rows of types")
    for number, text in enumerate(request.texts):
        if not 0 < len(text) <= spec.lengths[-1]:
            raise InvalidArgument(f"text {number} has {len(text)} tokens, not 1 to {spec.lengths[-1]}")
        if not 0 <= min(text) <= max(text) < config.vocab_size:
            raise InvalidArgument(f"text {number}: a token is not below {config.vocab_size}")
    for number, types in enumerate(request.types):
        if len(types) != len(request.texts[number]) or not 0 <= min(types) <= max(types) < config.types:
            raise InvalidArgument(f"text {number}: types must be below {config.types}, one for each token")
    length = bucket(max(map(len, request.texts)), spec.lengths)
    if len(request.texts) > spec.rows_for(length)[-1]:
        raise InvalidArgument(f"{len(request.texts)} texts of {length} tokens exceed {spec.step_tokens}")

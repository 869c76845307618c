"""Paged attention behind one interface; a backend is picked by device when a model is loaded.

A backend owns the layout of its cache. It writes the keys and values of new tokens to their pages and
attends over everything that a sequence has, so that each key and value byte is touched once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from llmos.drivers.jax.attention.projected import Projected
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument


class DecodePlan(NamedTuple):
    """One new token for each of B rows.

    ``tables`` [B, width] are page ids, ``lengths`` [B] count the tokens including the new one; the new
    token goes to ``pages`` [B] at ``offsets`` [B], and is dropped where the page is out of range.
    """

    tables: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class PrefillPlan(NamedTuple):
    """C consecutive tokens for each of R rows, from position ``starts`` [R] on.

    ``tables`` [R, width]; ``lengths`` [R] count a row's tokens up to its last new one; ``pages`` and
    ``offsets`` [R, C] say where each goes, and padding is dropped because its page is out of range.
    """

    tables: jax.Array
    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class VerifyPlan(NamedTuple):
    """The last token of each of B rows and C - 1 guessed ones, from position ``starts`` [B] on.

    As in ``PrefillPlan``; C is small, B may be large, and a row whose ``lengths`` is 0 reads nothing.
    """

    tables: jax.Array
    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array
    offsets: jax.Array


class MixedPlan(NamedTuple):
    """One new token for each of B rows, and then R pieces of prompts, of C tokens each, all in one row."""

    rows: DecodePlan
    pieces: VerifyPlan

    @property
    def pages(self) -> jax.Array:
        """Where the tokens go, [B + R * C]; their ``offsets`` likewise."""
        return jnp.concatenate([self.rows.pages, self.pieces.pages.reshape(-1)])

    @property
    def offsets(self) -> jax.Array:
        return jnp.concatenate([self.rows.offsets, self.pieces.offsets.reshape(-1)])

    def part(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B + R * C, ...] -> [B, ...] and [R, C, ...]."""
        rows = len(self.rows.pages)
        return x[:rows], x[rows:].reshape(*self.pieces.pages.shape, *x.shape[1:])


def joined(own: jax.Array, others: jax.Array) -> jax.Array:
    """What ``MixedPlan.part`` makes two of."""
    return jnp.concatenate([own, others.reshape(-1, *own.shape[1:])])


@dataclass(frozen=True)
class Scoring:
    """How a layer scores keys: with ``window``, only by the last so many tokens (itself included).

    Scores are multiplied by ``scale`` (0: head_dim ** -0.5), then softly capped at ``cap`` (0: not at all).
    """

    window: int = 0
    cap: float = 0.0
    scale: float = 0.0


PLAIN = Scoring()
CUDNN_HEAD = 128  # values of a head that cuDNN takes on every GPU
_NATIVE_KV = ("float32", "bfloat16")


class AttentionBackend(Protocol):
    """What a backend does; all methods but ``allocate`` are traced."""

    @property
    def knows_fresh(self) -> bool:
        """Whether ``prefill`` is faster when it is told that all rows are fresh."""
        ...

    @property
    def name(self) -> str:
        """How the backend is reported."""
        ...

    def allocate(self, config: DecoderConfig, pages: int, page_tokens: int, dtype: Any) -> list[Any]:
        """One zeroed cache per layer with ``pages`` pages; the last page is never written."""
        ...

    def scrub(self, cache: Any, pages: jax.Array) -> Any:
        """Zero whatever is not finite in the pages with these ids [n]; ids out of range are ignored."""
        ...

    def decode(
        self, plan: DecodePlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B, heads, head_dim], k and v [B, kv_heads, head_dim] -> output like q, and the cache."""
        ...

    def step(
        self, plan: DecodePlan, cache: Any, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """As ``decode``, of tokens [B] whose queries and keys are yet to be turned."""
        ...

    def prefill(
        self,
        plan: PrefillPlan,
        cache: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        fresh: bool,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """q [R, C, heads, head_dim], k and v [R, C, kv_heads, head_dim] -> output like q, and the cache.

        ``fresh`` (static): all rows start at position 0, so that nothing is read from the cache.
        """
        ...

    def verify(
        self, plan: VerifyPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B, C, heads, head_dim], k and v [B, C, kv_heads, head_dim] -> output like q, and the cache.

        Each token sees those before it; a row's pages are read once for all its tokens.
        """
        ...

    def extend(
        self,
        plan: PrefillPlan | VerifyPlan,
        cache: Any,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """As ``prefill`` or ``verify``, of tokens whose queries and keys are yet to be turned."""
        ...

    def mixed(
        self, plan: MixedPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B + R * C, heads, head_dim], k and v likewise -> output like q, and the cache.

        What ``decode`` and ``verify`` would do one after the other; pieces of a prompt see those before them.
        """
        ...


def suits_cudnn(head_dim: int) -> bool:
    """Whether cuDNN's attention takes heads of this size; it wants a multiple of 8."""
    return head_dim <= CUDNN_HEAD and head_dim % 8 == 0


class Turned:
    """What backends share whose kernels take queries and keys that are turned."""

    def step(
        self: AttentionBackend, plan: DecodePlan, cache: Any, new: Projected, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        return self.decode(plan, cache, *new.parts(), scoring)

    def extend(
        self: AttentionBackend,
        plan: PrefillPlan | VerifyPlan,
        cache: Any,
        new: Projected,
        fresh: bool = False,
        scoring: Scoring = PLAIN,
    ) -> tuple[jax.Array, Any]:
        if isinstance(plan, VerifyPlan):
            return self.verify(plan, cache, *new.parts(), scoring)
        return self.prefill(plan, cache, *new.parts(), fresh, scoring)


class Paged(Turned, ABC):
    """What backends share that write the new keys and values first and then attend over pages.

    All are written before any is read: XLA would copy the cache for a write between two reads.
    """

    @abstractmethod
    def write(self, cache: Any, pages: jax.Array, offsets: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        """The cache with k and v [n, kv_heads, head_dim] at ``pages`` and ``offsets`` [n]."""

    @abstractmethod
    def attend(
        self,
        tables: jax.Array,
        lengths: jax.Array,
        visible: jax.Array,
        cache: Any,
        q: jax.Array,
        scoring: Scoring = PLAIN,
    ) -> jax.Array:
        """Attend from q [B, C, heads, head_dim] over the first ``lengths`` [B] tokens of pages ``tables``.

        Of a row the first query sees the first ``visible`` [B] tokens, each later one a token more, and of
        these the last ``scoring.window``.
        """

    def decode(
        self, plan: DecodePlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        cache = self.write(cache, plan.pages, plan.offsets, k, v)
        return self._decode(plan, cache, q, scoring), cache

    def verify(
        self, plan: VerifyPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        cache = self.write(cache, plan.pages.reshape(-1), plan.offsets.reshape(-1), *flat)
        return self._verify(plan, cache, q, scoring), cache

    def mixed(
        self, plan: MixedPlan, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring = PLAIN
    ) -> tuple[jax.Array, Any]:
        cache = self.write(cache, plan.pages, plan.offsets, k, v)
        own, others = plan.part(q)
        first = self._decode(plan.rows, cache, own, scoring)
        return joined(first, self._verify(plan.pieces, cache, others, scoring)), cache

    def _decode(self, plan: DecodePlan, cache: Any, q: jax.Array, scoring: Scoring) -> jax.Array:
        return self.attend(plan.tables, plan.lengths, plan.lengths, cache, q[:, None], scoring)[:, 0]

    def _verify(self, plan: VerifyPlan, cache: Any, q: jax.Array, scoring: Scoring) -> jax.Array:
        return self.attend(plan.tables, plan.lengths, plan.starts + 1, cache, q, scoring)


def page_bytes(config: DecoderConfig, page_tokens: int, dtype: Any) -> int:
    """Bytes of one page of one layer, scales included; all backends lay pages out alike."""
    from llmos.drivers.jax.attention.xla import XlaAttention

    layer, *_ = jax.eval_shape(lambda: XlaAttention().allocate(config, 1, page_tokens, dtype))
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(layer))


def select(
    name: str, platform: str, config: DecoderConfig, request: LoadRequest, kernels: bool = False
) -> AttentionBackend:
    """The backend called ``name``, or with "auto" the fastest that this device and these shapes allow.

    ``kernels``: the CPU's native kernels are there. Where a GPU or TPU gets XLA's attention, the name says
    why.
    """
    from llmos.drivers.jax.attention.xla import XlaAttention

    if name in ("auto", "native") and platform == "cpu" and kernels and request.kv_dtype in _NATIVE_KV:
        from llmos.drivers.jax.attention.native import HEAD_MULTIPLE, NativeAttention

        if config.head_dim % HEAD_MULTIPLE == 0:
            return NativeAttention(tokens_in_flight=2048)
    if name == "native":
        raise InvalidArgument(
            "attention backend native needs a CPU, a compiler, pages in float32 or bfloat16, and head_dim a "
            "multiple of 16"
        )
    if name not in ("auto", "pallas", "tpu", "xla"):
        raise InvalidArgument(f"no attention backend {name!r}; there is: auto, native, pallas, tpu, xla")
    best = {"gpu": "pallas", "cuda": "pallas", "tpu": "tpu"}.get(platform, "xla") if name == "auto" else name
    if best == "xla":
        return XlaAttention(tokens_in_flight=2048 if platform == "cpu" else 8192)
    wanted = _pallas_wants(platform, request) if best == "pallas" else _tpu_wants(platform, config, request)
    if wanted and name != "auto":
        raise InvalidArgument(f"attention backend {name} needs {wanted}")
    if wanted:
        return XlaAttention(tokens_in_flight=8192, name=f"xla ({best} needs {wanted})")
    if best == "tpu":
        from llmos.drivers.jax.attention.tpu import TpuAttention

        return TpuAttention()
    from llmos.drivers.jax.attention.pallas import PallasAttention

    return PallasAttention()


def _pallas_wants(platform: str, request: LoadRequest) -> str:
    """What the kernels for GPUs would need and do not find, in words; nothing if they can be used."""
    tokens = request.page_tokens
    if platform not in ("gpu", "cuda"):
        return f"a GPU, here is {platform}"
    if request.dtype != "bfloat16":
        return f"dtype bfloat16, asked for is {request.dtype}"
    if tokens & (tokens - 1) or tokens < 16:
        return f"page_tokens that are a power of two from 16 on, asked for is {tokens}"
    return ""


def _tpu_wants(platform: str, config: DecoderConfig, request: LoadRequest) -> str:
    """As ``_pallas_wants``, of the kernel for TPUs."""
    if platform != "tpu":
        return f"a TPU, here is {platform}"
    if request.mesh:
        return "a model on one device"
    from llmos.drivers.jax.attention import tpu

    return tpu.wants(config, request.dtype, request.kv_dtype)

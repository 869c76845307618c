"""How large everything of a replica is: its limits, and the shapes that are compiled for it."""

from __future__ import annotations

from typing import Any

import jax

from llmos.drivers.jax import platform
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution import buckets
from llmos.drivers.jax.execution.ledger import Limits
from llmos.drivers.jax.execution.spec import PIECE, Spec, Speculating
from llmos.drivers.jax.loading.parameters import bytes_on_one, page_size
from llmos.drivers.jax.paging import pages
from llmos.drivers.jax.paging.sharing import HOST_CACHE_BYTES, Member
from llmos.drivers.jax.sharding.placement import OneDevice, Placement
from llmos.drivers.jax.speculation import verification
from llmos.drivers.jax.speculation.drafts import Draft
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import NoMemory

_TABLE_MULTIPLE = 16
_FIRST_ON_CPU = 7
# Guesses of a step, and tokens verified in a step over all its rows: elsewhere, and on a CPU, where a few
# rows already take longer than one.
_GUESSES = (7, 3)
_VERIFIED = (256, 32)
_MIXED = (4, 8, 16, 36, 64)


def limits_of(
    request: LoadRequest,
    config: DecoderConfig,
    place: Placement,
    shapes: dict[str, Any],
    draft: Draft | None,
    member: Member | None,
) -> tuple[Limits, int]:
    """Sizes of a replica whose parameters are ``shapes``, and the width of its block tables."""
    device = place.device
    context = min(request.max_context, config.max_positions)
    needed = -(-context // request.page_tokens)
    weights, configs = list(shapes.values()), [config]
    if draft is not None:
        weights, configs = weights + list(draft.shapes.values()), [config, draft.config]
    weight_bytes = sum(bytes_on_one(x) for x in weights)
    free = platform.free_memory(device) * request.memory_fraction - weight_bytes
    page_bytes = sum(page_size(place.local(each), request) for each in configs) / place.page_parts
    pages = request.pages or int(free // page_bytes)
    if not request.pages and device.platform == "cpu":
        pages = min(pages, request.slots * needed, max(int(HOST_CACHE_BYTES // page_bytes), needed))
    fits = not free or pages * page_bytes <= free / request.memory_fraction
    if member is not None:
        pages, fits = member.pages, True
    if pages < needed or not fits:
        raise NoMemory(
            f"{pages} pages of {page_bytes:.0f} bytes do not fit or hold less than one context of "
            f"{context}; lower max_context or pages, or raise memory_fraction or arena_bytes"
        )
    limits = Limits(
        slots=request.slots,
        pages=pages,
        page_tokens=request.page_tokens,
        max_context=context,
        chunk_tokens=min(request.chunk_tokens, request.slots * context),
        vocab_size=config.vocab_size,
        overtaking=request.speculation != "off",
    )
    return limits, -(-needed // _TABLE_MULTIPLE) * _TABLE_MULTIPLE


def spec_of(
    request: LoadRequest,
    shape: Shape,
    place: Placement,
    weights: Any,
    caches: Any,
    batch: Any,
    limits: Limits,
) -> Spec:
    """What to compile for a replica of these sizes."""
    # Padding a chunk to four times its length is cheaper on a CPU than compiling, and dear elsewhere.
    on_cpu = place.device.platform == "cpu"
    tiers = request.host_pages or request.disk_pages
    # Pipeline stages work on as many parts of a step.
    slots, chunk = (-(-size // place.stages) for size in (limits.slots, limits.chunk_tokens))
    longest = min(chunk, limits.max_context)
    return Spec(
        shape=shape,
        place=place,
        weights=weights,
        caches=caches,
        batch=batch,
        vocab=limits.vocab_size,
        max_context=limits.max_context,
        decode_sizes=decode_sizes(request, slots, on_cpu, shape.native),
        chunk_tokens=chunk,
        chunk_sizes=buckets.chunk_buckets(longest) if on_cpu else buckets.doubling_buckets(longest),
        prefill_rows=[1] if on_cpu else [1, 2, 4, 8, 16],
        # A person at a laptop waits for the first token; a server is ready when it runs at full speed.
        first=_FIRST_ON_CPU if on_cpu else 1 << 30,
        mixed=mixed_sizes(slots, chunk) if mixes(request, place) else ([], []),
        move_sizes=pages.sizes(caches) if tiers else (),
    )


def mixes(request: LoadRequest, place: Placement) -> bool:
    """Whether to decode and prefill in one program, which pays where reading weights is what takes time."""
    whole = isinstance(place, OneDevice) and request.speculation == "off"
    return whole and place.device.platform in ("gpu", "cuda")


def mixed_sizes(slots: int, chunk_tokens: int) -> tuple[list[int], list[int]]:
    """Rows and pieces of the programs that decode and prefill at once: for prompts so short that most of
    their time would be spent on reading weights a second time."""
    pieces = [count for count in _MIXED if count * PIECE <= chunk_tokens]
    return [slots] if pieces else [], pieces


def speculating_of(
    request: LoadRequest, limits: Limits, draft: Draft | None, sizes: list[int], on_cpu: bool
) -> Speculating | None:
    """How to guess, if at all."""
    if request.speculation == "off":
        return None
    tokens = request.speculation_tokens or _GUESSES[on_cpu]
    rows = _VERIFIED[on_cpu] // (tokens + 1)
    history = jax.eval_shape(lambda: verification.empty_history(limits.slots, limits.max_context))
    small = [size for size in sizes if size <= rows] or sizes[:1]
    return Speculating(tokens, small, history, draft.described(limits) if draft is not None else None)


def decode_sizes(request: LoadRequest, slots: int, on_cpu: bool, native: bool) -> list[int]:
    """Batch sizes to compile: few on a CPU, where compiling is slow and padding rows are cheap.

    They are cheap up to four rows in the native kernel; XLA:CPU converts a whole bfloat16 matrix for a
    product with one row, and not for two.
    """
    if not on_cpu:
        return buckets.decode_buckets(slots, factor=2)
    if native:
        return [size for size in buckets.decode_buckets(slots, factor=2) if size != 2 or slots == 2]
    return buckets.decode_buckets(slots, smallest=2 if request.dtype == "bfloat16" else 1)

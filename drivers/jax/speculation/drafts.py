"""A draft model that is to be loaded beside a model: what is refused, and what its programs take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.forward import Shape
from llmos.drivers.jax.execution.ledger import Limits
from llmos.drivers.jax.sharding.placement import Placement
from llmos.ipc.errors import InvalidArgument


@dataclass
class Draft:
    """A draft model in the place of the model's replica.

    ``shapes`` are its parameters as programs take them, ``load`` gives their values, ``kv_dtype`` is that of
    its cache, and ``native`` as in ``Shape``.
    """

    place: Placement
    config: DecoderConfig
    graph: Any
    tree: Any
    backend: AttentionBackend
    shapes: dict[str, Any]
    load: Callable[[], dict[str, jax.Array]]
    kv_dtype: Any
    native: bool

    def described(self, limits: Limits) -> tuple[Shape, list[Any], Any]:
        """What specialises its programs, and the shapes of its weights and caches."""
        pages = limits.pages + 1
        columns = self.place.columns(self.config.vocab_size)
        shape = Shape(self.graph, self.tree, self.backend, limits.page_tokens, pages, columns, self.native)
        return shape, list(self.shapes.values()), self._caches(limits)[0]

    def weights(self) -> list[jax.Array]:
        """Its weights, on the devices."""
        weights = self.load()
        return [weights[path] for path in self.shapes]

    def allocator(self, limits: Limits) -> Callable[[], Any]:
        """Makes empty caches for it, on the devices."""
        allocate: Callable[[], Any] = self._caches(limits)[1]
        return allocate

    def _caches(self, limits: Limits) -> Any:
        """It has as many pages as the model, for the block tables are the same."""
        allocate = partial(
            self.backend.allocate, pages=limits.pages + 1, page_tokens=limits.page_tokens, dtype=self.kv_dtype
        )
        return self.place.caches(allocate, self.config)


def check_draft(draft: DecoderConfig, config: DecoderConfig, context: int) -> None:
    """Refuse a draft model whose guesses would mean something else, or that cannot see ``context`` tokens."""
    if draft.vocab_size != config.vocab_size:
        raise InvalidArgument(
            f"the draft model has {draft.vocab_size} tokens and the model {config.vocab_size}: "
            "take one with the same vocabulary"
        )
    context = min(context, config.max_positions)
    if draft.max_positions < context:
        raise InvalidArgument(
            f"the draft model sees {draft.max_positions} tokens, fewer than a context of {context}: "
            "lower max_context or take another"
        )

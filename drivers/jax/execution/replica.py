"""One replica of a model: what it has on its devices, which programs take and give back, and its ledger.

What happens to it beside the steps is here: pages move, adapters come, weights are put down and taken up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax.execution import packing
from llmos.drivers.jax.execution.ledger import Ledger, Limits
from llmos.drivers.jax.execution.programs import Programs
from llmos.drivers.jax.execution.spec import SCRUB_PAGES
from llmos.drivers.jax.execution.state import BatchState, Tallies
from llmos.drivers.jax.paging.pool import Own, Share
from llmos.drivers.jax.speculation.speculating import Speculation
from llmos.drivers.sdk.messages import Start

Make = Callable[[], tuple[Own | Share, Any]]


class Replica:
    """``batch`` and ``caches`` are what the programs dispatched so far leave of them; ``tallies`` are made
    when a sequence first asks for them, and ``tallied`` are the slots that have some.

    ``entering`` are the sequences that the ledger has and the batch has not yet; ``faulty`` are the pages of
    those that failed. ``common`` is the sharding of what all devices have, such as the batch; ``make``
    allocates caches and a batch like those given, for a model that was ``parked``.
    """

    def __init__(
        self,
        limits: Limits,
        programs: Programs,
        weights: Any,
        pages: Own | Share,
        batch: BatchState,
        common: Any = None,
        speculation: Speculation | None = None,
        make: Make | None = None,
    ) -> None:
        self.limits = limits
        self.ledger = Ledger(limits)
        self.programs = programs
        self.batch = batch
        self.tallies: Tallies | None = None
        self.tallied: set[int] = set()
        self.entering: list[Start] = []
        self.faulty: list[int] = []
        self.speculation = speculation
        self.common = common
        self.parked = False
        self._keep(weights)
        self._pages = pages
        self._rows: dict[tuple[int, ...], Any] = {}
        self._make = make
        pages.cleaners.append(self._scrub)

    @property
    def caches(self) -> Any:
        """What programs take, and give back."""
        return self._pages.caches

    @caches.setter
    def caches(self, caches: Any) -> None:
        self._pages.caches = caches

    @property
    def width(self) -> int:
        """Columns of a block table."""
        return self.batch.tables.shape[1]

    def weights_for(self, adapters: bool) -> Any:
        """What forward programs take: the weights for rows with ``adapters``, or the plain ones."""
        return self._weights if adapters else self._plain

    def row_index(self, slots: list[int], size: int) -> Any:
        """Slot numbers padded with the spare row, kept on the device while the batch stays the same."""
        padded = (*slots, *[self.limits.slots] * (size - len(slots)))
        if padded not in self._rows:
            if len(self._rows) >= 4 * self.limits.slots + 16:
                self._rows.clear()
            self._rows[padded] = self.programs.place_rows(np.asarray(padded, np.int32))
        return self._rows[padded]

    def reset(self) -> None:
        """Empty all slots; what is on the device is overwritten when a slot is taken again."""
        self.ledger.slots.clear()
        self.entering = []

    def close(self) -> None:
        """Leave pages behind that others can use."""
        self._scrub()
        self._pages.cleaners.remove(self._scrub)

    def clean(self) -> None:
        """Clear the pages of failed sequences, of all models that may give this one theirs."""
        for scrub in self._pages.cleaners:
            scrub()

    def _scrub(self) -> None:
        """Clear what is not finite from the pages of failed sequences, lest it spread to the next owner."""
        pages, self.faulty = self.faulty, []
        for part in packing.parts(pages, SCRUB_PAGES, self.limits.pages + 1):
            self.caches = self.programs.get(("scrub",))(self.caches, np.asarray(part, np.int32))

    def read_pages(self, numbers: list[int]) -> Sequence[jax.Array]:
        """Dispatch a gather: the pages' rows, as the steps dispatched so far leave them."""
        program = self.programs.get(("gather", len(numbers)))
        rows: Sequence[jax.Array] = program(self.caches, np.asarray(numbers, np.int32))
        return rows

    def write_pages(self, numbers: list[int], rows: Sequence[jax.Array]) -> None:
        """Dispatch a scatter: the steps that follow find the rows in these pages."""
        program = self.programs.get(("scatter", len(numbers)))
        self.caches = program(self.caches, tuple(rows), np.asarray(numbers, np.int32))

    def place_adapter(self, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """The (A, B) of an adapter for each product, on this replica's device; on any thread."""
        placed: list[tuple[Any, Any]] = jax.device_put(pairs, self.common)
        return placed

    def adapt(self, number: int, pairs: list[tuple[Any, Any]]) -> None:
        """Put an adapter at its number: the steps dispatched from now on have it."""
        room = self.programs.spec.room
        assert room is not None
        stacks = [(self._weights[a], self._weights[b]) for a, b in room.places]
        program = self.programs.get(("adapt",))
        weights = list(self._weights)
        for (a, b), pair in zip(room.places, program(stacks, pairs, np.int32(number - 1)), strict=True):
            weights[a], weights[b] = pair
        self._keep(weights)

    @property
    def weights(self) -> list[jax.Array]:
        """Those of the model, and of its draft model."""
        more = self.speculation.weights if self.speculation is not None else []
        return [*jax.tree.leaves(self._weights), *more]

    @property
    def state(self) -> list[jax.Array]:
        """What it has on its devices beside the weights, while nothing is in flight, but for a pool."""
        more = self.speculation.state if self.speculation is not None else []
        caches = self._pages.caches if isinstance(self._pages, Own) else []
        held = (caches, self.batch, self.tallies, list(self._rows.values()), more)
        return [x for x in jax.tree.leaves(held) if isinstance(x, jax.Array)]

    def put_down(self, weights: list[jax.Array]) -> None:
        """See ``parking.Parkable``."""
        self.reset()
        self.parked = True
        self.tallies = None
        if isinstance(self._pages, Own):  # pages in a pool go to others, and are cleared for them
            self._pages.caches, self.faulty = [], []
        self.tallied.clear()
        self._rows.clear()
        self._take_weights(weights)

    def renew(self) -> Any:
        """See ``parking.Parkable``."""
        assert self._make is not None
        pages, batch = self._make()
        caches = pages.caches if isinstance(pages, Own) else []
        return caches, batch, self.speculation.renew() if self.speculation is not None else None

    def take_up(self, weights: list[jax.Array], state: Any) -> None:
        """See ``parking.Parkable``."""
        caches, self.batch, more = state
        if isinstance(self._pages, Own):
            self._pages.caches = caches
        self._take_weights(weights)
        if self.speculation is not None:
            self.speculation.take_up(more)
        self.parked = False

    def _take_weights(self, weights: list[jax.Array]) -> None:
        count = len(jax.tree.leaves(self._weights))
        self._keep(jax.tree.unflatten(jax.tree.structure(self._weights), weights[:count]))
        if self.speculation is not None:
            self.speculation.weights = weights[count:]

    def _keep(self, weights: Any) -> None:
        room = self.programs.spec.room
        self._weights, self._plain = weights, room.without(weights) if room is not None else weights

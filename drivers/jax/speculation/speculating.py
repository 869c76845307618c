"""The host's side of speculation: the history on the device, the policy, and the programs that they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmos.drivers.jax.execution.buckets import bucket
from llmos.drivers.jax.execution.programs import Programs
from llmos.drivers.jax.execution.spec import ADMIT_ROWS, with_adapters
from llmos.drivers.jax.sampling.sampling import Variant
from llmos.drivers.jax.speculation.speculation import Policy
from llmos.drivers.jax.speculation.verification import History
from llmos.drivers.sdk.messages import Start


class Speculation:
    """What an engine has more when it speculates.

    ``history`` is on the device; ``steps``, ``rows`` and ``gained`` count for each (batch size, guesses) the
    steps without prefill, their rows, and the tokens that these gained. ``draft`` are the weights and caches
    of the draft model, if there is one; ``renew`` makes a history and caches like those given.
    """

    def __init__(
        self,
        programs: Programs,
        policy: Policy,
        history: History,
        draft: tuple[Any, Any] | None = None,
        renew: Callable[[], tuple[History, Any]] | None = None,
    ) -> None:
        self.policy = policy
        self.history = history
        self._draft = draft
        self._renew = renew
        self.steps: Counter[tuple[int, int]] = Counter()
        self.rows: Counter[tuple[int, int]] = Counter()
        self.gained: Counter[tuple[int, int]] = Counter()
        self._programs = programs

    @property
    def weights(self) -> list[jax.Array]:
        """Those of the draft model."""
        return self._draft[0] if self._draft is not None else []

    @weights.setter
    def weights(self, weights: list[jax.Array]) -> None:
        if self._draft is not None:
            self._draft = weights, self._draft[1]

    @property
    def state(self) -> Any:
        """What else is on the devices."""
        return self.history, self._draft[1] if self._draft is not None else None

    def renew(self) -> tuple[History, Any]:
        """A new ``state``, empty."""
        assert self._renew is not None
        return self._renew()

    def take_up(self, state: tuple[History, Any]) -> None:
        """Go on with what ``renew`` made."""
        self.history, caches = state
        if self._draft is not None:
            self._draft = self._draft[0], caches

    def begin(self, starts: list[Start]) -> None:
        """Sequences enter: remember all that is known of them."""
        for start in starts:
            self.policy.begin(start.slot)
        if len(starts) == 1:
            self._recall(starts, 1)
            return
        for at in range(0, len(starts), ADMIT_ROWS):
            self._recall(starts[at : at + ADMIT_ROWS], ADMIT_ROWS)

    def choose(self, rows: list[int], variant: Variant, adapters: bool) -> tuple[int, int]:
        """The batch size for these slots, some with ``adapters``, and how many guesses the step verifies.

        None with penalties, which depend on the tokens before, and none where a program would have to be
        compiled first.
        """
        size = bucket(len(rows), self._programs.spec.decode_sizes)
        if variant == "full":
            return size, 0
        guesses = self.policy.choose(rows, size)
        verify = with_adapters(("verify", size, guesses), adapters)
        keys = verify, ("accept", variant, size, guesses)
        ready = self.policy.always or all(self._programs.ready(key) for key in keys)
        return size, guesses if ready else 0

    def programs(self, variant: Variant, size: int, guesses: int, adapters: bool) -> tuple[Any, Any]:
        """The programs that compute and that accept."""
        get = self._programs.get
        return get(with_adapters(("verify", size, guesses), adapters)), get(
            ("accept", variant, size, guesses)
        )

    def verify(self, program: Any, guesses: int, held: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """Run a program of ``programs`` on what the engine holds: the caches, logits, and the guess."""
        if self._draft is None or not guesses:
            caches, logits, guess = program(*held)
            return caches, logits, guess
        weights, drafts = self._draft
        caches, drafts, logits, guess = program(*held, weights, drafts)
        self._draft = weights, drafts
        return caches, logits, guess

    def observe(self, slot: int, guesses: int, trials: int, hits: int) -> None:
        """What became of the guesses for a slot; a plain step has looked some up, but not asked the draft."""
        if guesses or self._draft is None:
            self.policy.observe(slot, trials, hits)

    def resolved(self, rows: int, size: int, guesses: int, gained: int, seconds: float) -> None:
        """A step without prefill took so long and gained so many tokens."""
        key = size, guesses
        self.steps[key] += 1
        self.rows[key] += rows
        self.gained[key] += gained
        self.policy.timed(size, guesses, seconds)

    def _recall(self, starts: list[Start], rows: int) -> None:
        tokens = np.zeros((rows, self.history.tokens.shape[1]), np.int32)
        slots = np.full(rows, self.history.tokens.shape[0], np.int32)
        for row, start in enumerate(starts):
            tokens[row, : len(start.tokens)] = start.tokens
            slots[row] = start.slot
        self.history = self._programs.get(("recall", rows))(self.history, slots, tokens)

"""What the programs of a pipeline stage are, where they differ from those of a whole model."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.execution.recipes import Recipes, ints
from llmos.drivers.jax.execution.spec import Key, Spec
from llmos.drivers.jax.pipeline import steps
from llmos.drivers.jax.sharding.placement import Program


class StageRecipes(Recipes):
    """``x`` is the shape of what is fed for one token; None: token ids. Only the ``last`` makes logits."""

    def __init__(self, spec: Spec, x: Any, last: bool) -> None:
        super().__init__(spec)
        self._x = x
        self._last = last

    def outputs(self, key: Key) -> Any:
        if key[0] in ("decode", "prefill") and not self._last:
            return (1, None, None) if key[0] == "decode" and self._x is None else (1, None)
        return super().outputs(key)

    def describe(self, key: Key) -> tuple[Program, tuple[int, ...], tuple[Any, ...]]:
        spec = self.spec
        held = (spec.weights, spec.caches)
        match key:
            case ("absorb", int(size)):
                return steps.absorb, (0,), (spec.batch, ints(size), ints(2, size))
            case ("decode", int()) if self._x is None:
                _, donated, arguments = super().describe(key)
                return partial(steps.enter, spec.shape), donated, arguments
            case ("decode", int(size)):
                plan = ints(size, steps.PLANNED + spec.batch.tables.shape[1])
                return partial(steps.proceed, spec.shape), (1,), (*held, self._fed(size), plan)
            case ("prefill", int(rows), int(size), bool()) if self._x is not None:
                program, donated, arguments = super().describe(key)
                return program, donated, (*arguments, self._fed(rows, size))
        return super().describe(key)

    def _fed(self, *tokens: int) -> Any:
        return struct((*tokens, *self._x.shape), self._x.dtype)

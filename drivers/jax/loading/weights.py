"""A model's parameters on its devices: restored, converted and kept, or made up."""

from __future__ import annotations

from typing import Any

import jax

from llmos.drivers.jax.loading.phases import Phases
from llmos.drivers.jax.loading.plan import Plan
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.random import RandomSource, fill
from llmos.drivers.jax.weights.source import open_source
from llmos.ipc.errors import InvalidArgument


def load_weights(plan: Plan, path: str, shapes: dict[str, Any], phases: Phases) -> dict[str, jax.Array]:
    """The parameters of ``shapes``; those of a kept checkpoint if it is sound, else of the model at ``path``.

    InvalidArgument names the tensor that is wrong.
    """
    if plan.kept and plan.folder:
        try:
            folder = plan.folder
            phases.note("restore")(0, 0)
            return dict(phases.timed("restore", lambda: checkpoint.restore(folder, shapes)))
        except InvalidArgument as damage:
            if checkpoint.is_checkpoint(path):
                raise
            checkpoint.discard(folder, damage.message)
    source = plan.source or open_source(path)
    if isinstance(source, RandomSource):
        return dict(phases.timed("place", lambda: placed(fill(shapes))))
    place = lambda path, value: jax.device_put(value, shapes[path].sharding)  # noqa: E731
    arguments = (source, plan.family, plan.config, shapes, place, phases.note("convert"))
    weights = phases.timed("convert", lambda: convert(*arguments))
    if plan.folder:
        target = plan.folder
        phases.note("save")(0, 0)
        phases.timed("save", lambda: checkpoint.save(target, plan.family.name, plan.config, weights))
    return dict(weights)


def placed(tree: Any) -> Any:
    """A tree of arrays, once they are on their devices."""
    return jax.block_until_ready(tree)  # type: ignore[no-untyped-call]

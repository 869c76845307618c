"""What the loader puts an engine with pipeline stages together of: the parts of every stage, as one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.execution.engine import Engine
from llmos.drivers.jax.execution.ledger import Limits
from llmos.drivers.jax.execution.programs import Programs
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.paging.pool import Own
from llmos.drivers.jax.pipeline.programs import Batch, PipelinePrograms
from llmos.drivers.jax.pipeline.recipes import StageRecipes

if TYPE_CHECKING:
    from llmos.drivers.jax.loading.parts import Parts


@dataclass
class Pipeline:
    """As ``loading.parts.Parts``, of a replica in stages. ``kept`` has all parameters, once."""

    stages: list[Parts]
    limits: Limits
    kept: dict[str, Any]
    shapes: dict[str, Any]
    programs: PipelinePrograms
    member: None = None  # stages have pages of their own

    @classmethod
    def join(cls, stages: list[Parts], x: Any) -> Pipeline:
        """The parts of all stages together; ``x`` is the shape of one token's activations between them."""
        kept: dict[str, Any] = {}
        for part in stages:
            kept = part.kept | kept
        shapes = {
            _name(number, path): shape
            for number, part in enumerate(stages)
            for path, shape in part.shapes.items()
        }
        made = []
        for number, part in enumerate(stages):
            spec = part.programs.spec
            recipes = StageRecipes(spec, x if number else None, part is stages[-1])
            made.append(Programs(spec, recipes))
        return cls(stages, stages[0].limits, kept, shapes, PipelinePrograms(made))

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loaded parameters as the stages' programs take them; a tied embedding is copied to the last."""
        made = {}
        for number, part in reversed(list(enumerate(self.stages))):
            own = {path: _moved(weights, path, x.sharding) for path, x in part.kept.items()}
            for path, value in part.place.arrange(config, own).items():
                made[_name(number, path)] = value
        return made

    def make(self) -> tuple[Own, Batch]:
        """The caches of all stages, and the batch on the first and the last."""
        made = [part.make() for part in self.stages]
        return Own([held.caches for held, _ in made]), Batch(made[0][1], made[-1][1])

    def engine(self, weights: dict[str, jax.Array], caches: Own, batch: Any) -> Engine:
        """An engine of this replica."""
        ordered = [
            [weights[_name(number, path)] for path in part.shapes] for number, part in enumerate(self.stages)
        ]
        common = self.stages[-1].place.common
        replica = Replica(self.limits, self.programs, ordered, caches, batch, common, make=self.make)
        engine = Engine(replica)
        engine.rehearse_later(self.programs.ahead())
        return engine


def _moved(weights: dict[str, jax.Array], path: str, sharding: Any) -> jax.Array:
    """A parameter taken from where it is, or copied from another stage's devices."""
    value = weights[path]
    return weights.pop(path) if value.sharding == sharding else jax.device_put(value, sharding)


def _name(stage: int, path: str) -> str:
    """A parameter as a stage takes it."""
    return f"{stage}:{path}"

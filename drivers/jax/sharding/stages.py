"""Pipeline stages: which layers each holds, and a stage's place as a model of those layers alone.

A stage is a group of devices of its own with a contiguous share of the layers, their parameters and their
caches. The first has the embedding and the last the output head, so a tied embedding is held by both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import Decoder
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.jax.sharding.mesh import Axes, replicas
from llmos.drivers.jax.sharding.placement import Options, Placement, Program, place

_LAYER = re.compile(r"layers\.(\d+)\.")
_ENTRY = re.compile(r"embedding|positions")


def shares(layers: int, stages: int) -> list[range]:
    """The layers of each stage; if they do not divide, the first have one more, for the last has the head."""
    each, more = divmod(layers, stages)
    bounds = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def places(devices: Sequence[Any], axes: Axes, config: DecoderConfig) -> list[list[Placement]]:
    """The places of each replica's stages; where there is one stage, it is the place of the whole model."""
    found: list[list[Placement]] = []
    for group in replicas(devices, axes):
        each = len(group) // axes.pipeline
        inner = [place(group[at : at + each], axes) for at in range(0, len(group), each)]
        cuts = shares(config.layers, axes.pipeline)
        staged = [Stage(x, cut, config.layers, axes.pipeline, config.tied) for x, cut in zip(inner, cuts)]
        found.append(inner if axes.pipeline == 1 else list(staged))
    return found


@dataclass(frozen=True)
class Stage:
    """Some of a model's ``layers``, where ``inner`` puts them."""

    inner: Placement
    layers: range
    whole: int
    stages: int
    tied: bool

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.stop == self.whole

    @property
    def device(self) -> Any:
        return self.inner.device

    @property
    def common(self) -> Any:
        return self.inner.common

    def link(self, cache: Path) -> None:
        self.inner.link(cache)

    @property
    def sums(self) -> str:
        return self.inner.sums

    def local(self, config: DecoderConfig) -> DecoderConfig:
        return self.inner.local(config)

    def cut(self, decoder: Decoder) -> None:
        self.inner.cut(decoder)
        decoder.layers = nnx.List([decoder.layers[layer] for layer in self.layers])
        decoder.first, decoder.last = self.first, self.last
        for name in ("embedding", "positions", "norm", "head"):
            if hasattr(decoder, name) and not self._holds(name):
                delattr(decoder, name)

    @property
    def page_parts(self) -> float:
        return self.inner.page_parts * self.whole / len(self.layers)

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        return self.inner.attention(backend)

    def kept(self, shapes: dict[str, Any]) -> dict[str, Any]:
        return self.inner.kept({path: x for path, x in shapes.items() if self._holds(path)})

    def arranged(self, config: DecoderConfig, shapes: dict[str, Any]) -> dict[str, Any]:
        return self.inner.arranged(config, shapes)

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return self.inner.arrange(config, weights)

    def columns(self, vocab: int) -> Columns:
        return self.inner.columns(vocab)

    def logits(self, *shape: int) -> Any:
        return self.inner.logits(*shape)

    def caches(self, make: Callable[[DecoderConfig], Any], config: DecoderConfig) -> tuple[Any, Program]:
        return self.inner.caches(lambda whole: make(whole)[self.layers.start : self.layers.stop], config)

    def compile(
        self, program: Program, donated: tuple[int, ...], arguments: Any, outputs: Any, options: Options
    ) -> Program:
        return self.inner.compile(program, donated, arguments, outputs, options)

    def _holds(self, path: str) -> bool:
        """Whether a parameter belongs to this stage."""
        if match := _LAYER.match(path):
            return int(match[1]) in self.layers
        if _ENTRY.match(path):
            return self.first or (self.last and self.tied and path == "embedding")
        return self.last

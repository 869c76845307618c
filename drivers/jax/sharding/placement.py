"""Where a model's arrays are put and how its programs are compiled: on one device, or over a mesh."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import Decoder, struct
from llmos.drivers.jax.sharding import exchange, rules
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.jax.sharding.mesh import Axes, make_mesh
from llmos.drivers.jax.sharding.sequence import SequenceAttention

Program = Callable[..., Any]
Options = dict[str, Any] | None


class Placement(Protocol):
    """The place of one replica of a model."""

    @property
    def device(self) -> Any:
        """One device that stands for all of them: they are alike."""
        ...

    @property
    def common(self) -> Any:
        """The sharding of what every device has: the batch, token ids."""
        ...

    def link(self, cache: Path) -> None:
        """Make ready what small sums over the devices are done with; ``cache`` is for what is compiled."""
        ...

    @property
    def sums(self) -> str:
        """What small sums are done with: "exchange", "xla" and why, or nothing where there are none."""
        ...

    def local(self, config: DecoderConfig) -> DecoderConfig:
        """What one device computes of a model."""
        ...

    def cut(self, decoder: Decoder) -> None:
        """Make a decoder of the local configuration add up what the devices compute."""
        ...

    @property
    def page_parts(self) -> float:
        """How many times more pages there is room for than if a device held all of them, of all layers."""
        ...

    @property
    def stages(self) -> int:
        """How many pipeline stages work on a batch at the same time."""
        ...

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        """The backend that attends over the pages as they are spread."""
        ...

    def kept(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Parameters as they are loaded: ``shapes`` with shardings."""
        ...

    def arranged(self, config: DecoderConfig, shapes: dict[str, Any]) -> dict[str, Any]:
        """Parameters as programs take them."""
        ...

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loaded parameters as programs take them; what changes is given up."""
        ...

    def columns(self, vocab: int) -> Columns:
        """How logits are cut, inside a program."""
        ...

    def logits(self, *shape: int) -> Any:
        """The shape of logits [..., vocab] of all devices, with padding, as programs take and give them."""
        ...

    def caches(self, make: Callable[[DecoderConfig], Any], config: DecoderConfig) -> tuple[Any, Program]:
        """Shapes of the caches that ``make`` allocates for a configuration, and how to allocate them."""
        ...

    def compile(
        self, program: Program, donated: tuple[int, ...], arguments: Any, outputs: Any, options: Options
    ) -> Program:
        """A compiled program; ``options`` are XLA's, by name.

        ``outputs`` is, for each output, the argument that it lies like, its shape with a sharding, or None
        for what every device has.
        """
        ...


def place(devices: Sequence[Any], axes: Axes) -> Placement:
    """The place of what one program runs: a replica, or a pipeline stage of it."""
    return OneDevice(devices[0]) if len(devices) == 1 else Sharded(make_mesh(devices, axes), axes)


@dataclass(frozen=True)
class OneDevice:
    """Everything on one device, as it is."""

    device: Any

    @property
    def common(self) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.device)

    def link(self, cache: Path) -> None:
        return

    @property
    def sums(self) -> str:
        return ""

    def local(self, config: DecoderConfig) -> DecoderConfig:
        return config

    def cut(self, decoder: Decoder) -> None:
        return

    @property
    def page_parts(self) -> float:
        return 1

    @property
    def stages(self) -> int:
        return 1

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        return backend

    def kept(self, shapes: dict[str, Any]) -> dict[str, Any]:
        return {path: struct(x.shape, x.dtype, self.common) for path, x in shapes.items()}

    def arranged(self, config: DecoderConfig, shapes: dict[str, Any]) -> dict[str, Any]:
        return self.kept(shapes)

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return weights

    def columns(self, vocab: int) -> Columns:
        return Columns(vocab)

    def logits(self, *shape: int) -> Any:
        return struct(shape, jnp.float32, self.common)

    def caches(self, make: Callable[[DecoderConfig], Any], config: DecoderConfig) -> tuple[Any, Program]:
        allocate = partial(make, config)
        shapes = _at(jax.eval_shape(allocate), lambda _: self.common)
        return shapes, jax.jit(allocate, out_shardings=self.common)

    def compile(
        self, program: Program, donated: tuple[int, ...], arguments: Any, outputs: Any, options: Options
    ) -> Program:
        placed = _at(arguments, lambda _: self.common)
        return jax.jit(program, donate_argnums=donated).lower(*placed).compile(options)


@dataclass(frozen=True)
class Sharded:
    """One part of the model on each device of a mesh; see ``rules``."""

    mesh: Mesh
    axes: Axes

    @property
    def device(self) -> Any:
        return self.mesh.devices.flat[0]

    @property
    def common(self) -> NamedSharding:
        return self._at(rules.spec())

    def link(self, cache: Path) -> None:
        if self.device.platform == "gpu":
            exchange.enable(self.mesh.devices.ravel().tolist(), cache)

    @property
    def sums(self) -> str:
        why = exchange.state(self.mesh.devices.ravel().tolist())
        if why == exchange.READY:
            return "exchange"
        return f"xla ({why})" if why else "xla"

    def local(self, config: DecoderConfig) -> DecoderConfig:
        return rules.local_config(config, self.axes)

    def cut(self, decoder: Decoder) -> None:
        rules.cut(decoder, self.axes)

    @property
    def page_parts(self) -> float:
        return self.axes.sequence

    @property
    def stages(self) -> int:
        return 1

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        return SequenceAttention(parts=self.axes.sequence) if self.axes.sequence > 1 else backend

    def kept(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Cut as in the end, so that a device reads no more than its part, unless that does not divide."""
        return {path: self._weight(path, x, whole=True) for path, x in shapes.items()}

    def arranged(self, config: DecoderConfig, shapes: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for path, x in shapes.items():
            arrange = rules.arrangement(path, config, self.axes)
            made[path] = self._weight(path, jax.eval_shape(arrange, x) if arrange else x)
        return made

    def arrange(self, config: DecoderConfig, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        made: dict[str, jax.Array] = {}
        programs: dict[str, Program] = {}
        for path in list(weights):
            value = weights.pop(path)
            if arrange := rules.arrangement(path, config, self.axes):
                shape = self._weight(path, jax.eval_shape(arrange, value))
                # Layers are alike: one program serves the parameter of all of them.
                role = re.sub(r"\d+", "", path)
                programs.setdefault(role, jax.jit(arrange, out_shardings=shape.sharding))
                value = programs[role](value)
            made[path] = value
        return made

    def columns(self, vocab: int) -> Columns:
        return Columns(vocab, self.axes.wide)

    def logits(self, *shape: int) -> Any:
        *rows, vocab = shape
        cut = self._at(rules.spec(*[None] * len(rows), self.axes.wide))
        return struct((*rows, vocab + -vocab % self.axes.slices), jnp.float32, cut)

    def caches(self, make: Callable[[DecoderConfig], Any], config: DecoderConfig) -> tuple[Any, Program]:
        allocate = partial(make, rules.stored_config(config, self.axes))
        shapes = _at(
            jax.eval_shape(allocate),
            lambda _: self._at(rules.spec(self.axes.named("sequence"), self.axes.heads)),
        )
        placed = jax.tree.map(lambda x: x.sharding, shapes)
        return shapes, jax.jit(allocate, out_shardings=placed)

    def compile(
        self, program: Program, donated: tuple[int, ...], arguments: Any, outputs: Any, options: Options
    ) -> Program:
        placed = _at(arguments, lambda x: x.sharding or self.common)
        specs = jax.tree.map(lambda x: x.sharding.spec, placed)

        def spec(output: Any) -> Any:
            if output is None:
                return rules.spec()
            return specs[output] if isinstance(output, int) else output.sharding.spec

        results = jax.tree.map(spec, outputs, is_leaf=lambda x: x is None)
        local = jax.shard_map(program, mesh=self.mesh, in_specs=specs, out_specs=results, check_vma=False)
        own = self.sums == "exchange"
        with exchange.use(self.mesh.size if own else 0):
            traced = jax.jit(local, donate_argnums=donated).lower(*placed)
        return traced.compile((options or {}) | exchange.OPTIONS if own else options)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _weight(self, path: str, x: Any, whole: bool = False) -> Any:
        """The shape of a parameter where it belongs; with ``whole``, uncut if it cannot be cut as it is."""
        spec = rules.spec_of(path, len(x.shape), self.axes)
        if whole and not self._divides(x.shape, spec):
            spec = rules.spec()
        return struct(x.shape, x.dtype, self._at(spec))

    def _divides(self, shape: tuple[int, ...], spec: PartitionSpec) -> bool:
        named = (names if isinstance(names, tuple) else (names,) if names else () for names in spec)
        return all(
            size % prod(self.mesh.shape[name] for name in names) == 0 for size, names in zip(shape, named)
        )


def _at(tree: Any, sharding: Callable[[Any], Any]) -> Any:
    """Shapes of a tree of arrays or shapes, with shardings."""
    return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding(x)), tree)

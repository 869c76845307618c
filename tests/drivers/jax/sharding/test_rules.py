"""Where parameters lie on a mesh, and in what order the rows of fused products do."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax import families
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding import mesh, rules
from llmos.drivers.jax.sharding.mesh import Axes
from llmos.drivers.jax.sharding.placement import OneDevice, Sharded
from llmos.drivers.jax.weights.source import open_source

DATA = Path(__file__).parents[3] / "data" / "families"
WHOLE = ("norm", "router", "positions")
"""What every device has: norms, and what is small."""


def config_of(name: str) -> DecoderConfig:
    source = open_source(str(DATA / name))
    return families.find(source).configure[source.format](source)


def test_fused_rows_go_to_the_device_that_has_their_heads() -> None:
    config = config_of("llama")  # 4 heads, 2 KV heads of 8
    rows = np.concatenate(
        [[f"q{i}"] * 8 for i in range(4)] + [[f"{x}{i}"] * 8 for x in "kv" for i in range(2)]
    )
    numbers = jnp.arange(len(rows))

    def order(parts: int) -> list[str]:
        arrange = rules.arrangement("layers.0.attention.qkv.weight", config, Axes(tensor=parts))
        assert arrange is not None
        return list(rows[np.asarray(arrange(numbers))][::8])

    assert order(2) == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    assert order(4) == ["q0", "k0", "v0", "q1", "k0", "v0", "q2", "k1", "v1", "q3", "k1", "v1"]


def test_a_gate_goes_with_its_up() -> None:
    config = config_of("llama")
    arrange = rules.arrangement("layers.0.mlp.gate_up.weight", config, Axes(tensor=2))
    assert arrange is not None
    inner, half = config.intermediate, config.intermediate // 2
    first = np.asarray(arrange(jnp.arange(2 * inner)))[:inner]
    assert first.tolist() == [*range(half), *range(inner, inner + half)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3", "qwen3_moe", "mixtral"])
def test_all_that_is_large_is_cut(name: str) -> None:
    config = config_of(name)
    axes = Axes(tensor=2, expert=2) if config.experts else Axes(tensor=4)
    devices = jax.devices()
    place = Sharded(mesh.make_mesh(devices[:4], axes), axes)
    shapes = parameters.parameters(config, jnp.float32, OneDevice(devices[0]))[-1]
    for path, shape in place.arranged(config, shapes).items():
        held = shape.sharding.shard_shape(shape.shape)
        whole = len(shape.shape) == 1 or any(part in path for part in WHOLE)
        assert whole or np.prod(held) * 4 == np.prod(shape.shape), path

"""Kept weights know nothing of meshes: saved on any, restored on any other, each shard to its device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding import mesh, stages
from llmos.drivers.jax.sharding.mesh import Axes
from llmos.drivers.jax.sharding.placement import OneDevice, Placement, Sharded
from llmos.drivers.jax.weights import checkpoint


def restored(kept: Path, place: Placement) -> dict[str, jax.Array]:
    _, config, _ = checkpoint.read_manifest(kept)
    return checkpoint.restore(kept, parameters.parameters(config, jnp.float32, place)[-1])


def test_weights_saved_on_one_mesh_are_restored_on_another(
    on_mesh: Callable[..., Any], fresh_cache: Path
) -> None:
    saved = on_mesh("llama", {"tensor": 4})
    assert "save" in saved.loaded.phases
    other = on_mesh("llama", {"tensor": 2})
    assert "restore" in other.loaded.phases
    other.check()
    (kept,) = (fresh_cache / "weights").iterdir()
    devices = jax.devices()
    whole = restored(kept, OneDevice(devices[0]))
    cut = restored(
        kept, Sharded(mesh.make_mesh(devices[:8], Axes(sequence=2, tensor=4)), Axes(sequence=2, tensor=4))
    )
    for path, value in whole.items():
        np.testing.assert_array_equal(value, cut[path], err_msg=path)
    down = cut["layers.0.mlp.down.weight"]
    assert {shard.data.shape for shard in down.addressable_shards} == {(32, 48 // 8)}


def test_stages_restore_what_they_hold_straight_to_their_devices(
    on_mesh: Callable[..., Any], fresh_cache: Path
) -> None:
    on_mesh("llama", {"tensor": 2})
    (kept,) = (fresh_cache / "weights").iterdir()
    config = checkpoint.read_manifest(kept)[1]
    axes, devices = Axes(pipeline=2, tensor=2), jax.devices()
    (places,) = stages.places(devices[:4], axes, config)
    wanted = [parameters.parameters(config, jnp.float32, place)[-1] for place in places]
    held = checkpoint.restore(kept, wanted[0] | wanted[1])
    for shapes, own in zip(wanted, (devices[:2], devices[2:4]), strict=True):
        assert {device for path in shapes for device in held[path].devices()} == set(own)
    for layer in range(2):
        down = held[f"layers.{layer}.mlp.down.weight"]
        assert {shard.data.shape for shard in down.addressable_shards} == {(32, 48 // 2)}
    staged = on_mesh("llama", {"pipeline": 2, "tensor": 2})
    assert "restore" in staged.loaded.phases


def test_weights_saved_by_stages_are_restored_on_one_device(
    on_mesh: Callable[..., Any], fresh_cache: Path
) -> None:
    saved = on_mesh("gemma2", {"pipeline": 2})
    assert "save" in saved.loaded.phases
    other = on_mesh("gemma2", {})
    assert "restore" in other.loaded.phases
    assert other.loaded.parameters == saved.loaded.parameters
    other.check()

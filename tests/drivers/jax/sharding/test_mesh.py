"""What a mesh asks of the devices and the model: every refusal names the numbers that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.sharding import mesh
from llmos.drivers.jax.sharding.mesh import Axes
from llmos.ipc.errors import InvalidArgument

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden": 32,
    "layers": 2,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 8,
    "intermediate": 48,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_positions": 256,
}


def config(**fields: Any) -> DecoderConfig:
    return DecoderConfig(**(SIZES | fields))


@pytest.mark.parametrize(
    ("request_mesh", "message"),
    [
        ({"tensors": 2}, "mesh axis 'tensors' is not known; known: data, expert, pipeline, sequence, tensor"),
        ({"tensor": 0}, "mesh axis tensor is 0; it must be 1 or more"),
        ({"data": -1}, "mesh axis data is -1"),
    ],
)
def test_axes_are_named_and_positive(request_mesh: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        mesh.parse(request_mesh)


def test_a_mesh_takes_the_product_of_its_axes() -> None:
    axes = mesh.parse({"data": 2, "tensor": 4})
    mesh.check_devices(axes, 8)
    with pytest.raises(InvalidArgument, match="data 2 x tensor 4 takes 8 devices and this driver has 7"):
        mesh.check_devices(axes, 7)


@pytest.mark.parametrize(
    ("axes", "fields", "message"),
    [
        (Axes(tensor=3), {}, "heads 8 cannot be cut by tensor 3; the largest that divides it is 2"),
        (Axes(tensor=2), {"heads": 9, "kv_heads": 9}, "heads 9 cannot be cut by tensor 2"),
        (
            Axes(tensor=4),
            {"heads": 12, "kv_heads": 6},
            "6 KV heads are neither divided by nor repeated over tensor 4; one of 6 and 4",
        ),
        (Axes(tensor=4), {"intermediate": 50}, "intermediate 50 cannot be cut by tensor 4"),
        (
            Axes(sequence=4, tensor=2),
            {"intermediate": 12},
            "intermediate 12 cannot be cut by sequence 4 x tensor 2",
        ),
        (
            Axes(pipeline=3),
            {},
            "mesh axis pipeline is 3, but the model has 2 layers, and a stage holds at least one",
        ),
        (Axes(expert=2), {}, "mesh axis expert is 2, but the model has no experts: use tensor"),
        (
            Axes(expert=4),
            {"experts": 6, "active_experts": 2, "expert_intermediate": 48},
            "experts 6 cannot be cut by expert 4; the largest that divides it is 3",
        ),
        (
            Axes(tensor=2, expert=2),
            {"experts": 4, "active_experts": 2, "expert_intermediate": 25},
            "expert intermediate 25 cannot be cut by tensor 2",
        ),
        (
            Axes(tensor=4, expert=4),
            {"experts": 4, "active_experts": 2, "expert_intermediate": 24},
            "heads 8 cannot be cut by expert 4 x tensor 4; the largest that divides it is 8",
        ),
    ],
)
def test_a_mesh_that_the_model_cannot_be_cut_by_is_refused(
    axes: Axes, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        mesh.check_model(axes, config(**fields))


@pytest.mark.parametrize("axes", [Axes(), Axes(tensor=2), Axes(tensor=8), Axes(data=7, tensor=4, pipeline=2)])
def test_a_mesh_that_fits_is_accepted(axes: Axes) -> None:
    mesh.check_model(axes, config())


def test_a_replica_has_neighbouring_devices() -> None:
    assert mesh.replicas(range(8), Axes(data=2, tensor=3)) == [[0, 1, 2], [3, 4, 5]]

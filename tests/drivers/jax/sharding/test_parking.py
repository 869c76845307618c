"""Every shard of a model is parked beside its device and comes back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmos.drivers.jax.parking import Parked


@pytest.mark.parametrize(
    "mesh",
    [
        {"tensor": 2},
        {"pipeline": 2},
        pytest.param({"data": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_on_a_mesh_computes_the_same_after_waking(
    on_mesh: Callable[..., Any], mesh: dict[str, int]
) -> None:
    model = on_mesh("llama", mesh)
    replicas = [engine.replica for engine in model.engines]
    before = [replica.weights for replica in replicas]
    placed = [[x.sharding for x in weights] for weights in before]
    parked = Parked(replicas, model.driver._devices()[0], host=True)
    assert parked.park()()().bytes > 0
    assert all(x.is_deleted() for weights in before for x in weights)
    parked.wake()()()
    assert [[x.sharding for x in replica.weights] for replica in replicas] == placed
    for number in range(len(replicas)):
        model.check(number)

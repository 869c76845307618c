"""Pipeline stages: what each holds, and what a model in stages refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from llmos.drivers.jax.sharding.stages import shares
from llmos.ipc.errors import InvalidArgument, NotSupported

OnMesh = Callable[..., Any]


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(32, 4, [8, 8, 8, 8]), (7, 4, [2, 2, 2, 1]), (3, 3, [1, 1, 1]), (5, 1, [5])],
)
def test_layers_are_shared_evenly_and_the_last_stage_has_no_more(
    layers: int, stages: int, sizes: list[int]
) -> None:
    found = shares(layers, stages)
    assert [len(share) for share in found] == sizes
    assert [layer for share in found for layer in share] == list(range(layers))


def test_a_stage_holds_its_layers_and_their_pages_alone(on_mesh: OnMesh) -> None:
    model = on_mesh("gemma3", {"pipeline": 4})
    replica, devices = model.engines[0].replica, jax.devices()
    weights, caches = replica.weights_for(adapters=False), replica.caches
    for stage in range(4):
        held = jax.tree.leaves((weights[stage], caches[stage]))
        assert {device for value in held for device in value.devices()} == {devices[stage]}
    assert [len(own) for own in caches] == [2, 2, 2, 1]
    # Two layers have eleven parameters each here; the tied embedding is on the first stage and on the last.
    layer = len(weights[1]) // 2
    assert [len(own) for own in weights] == [2 * layer + 1, 2 * layer, 2 * layer, layer + 2]
    model.check()


def test_the_stage_with_the_least_room_sets_the_number_of_pages(
    on_mesh: OnMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = dict.fromkeys(jax.devices(), 40000000)
    room[jax.devices()[1]] = 4_000_000
    monkeypatch.setattr("llmos.drivers.jax.platform.free_memory", room.__getitem__)
    pages = [on_mesh("llama", mesh, pages=0, slots=4096).loaded.pages for mesh in ({}, {"pipeline": 2})]
    assert 0 < pages[1] < pages[0]


def test_steps_are_cut_for_the_stages(on_mesh: OnMesh) -> None:
    model = on_mesh("llama", {"pipeline": 2}, slots=6)
    spec = model.engines[0].programs.spec
    assert spec.decode_sizes[-1] == 3
    assert spec.chunk_sizes == [model.loaded.chunk_tokens // 2]


@pytest.mark.parametrize("way", ["ngram", "draft"])
def test_guessing_is_refused_with_stages(on_mesh: OnMesh, way: str) -> None:
    with pytest.raises(InvalidArgument, match='does not speculate: set speculation = "off"'):
        on_mesh("llama", {"pipeline": 2}, speculation=way, draft="x")


def test_a_driver_that_may_choose_does_not_guess_with_stages(on_mesh: OnMesh) -> None:
    assert on_mesh("llama", {"pipeline": 2}, speculation="auto").engines[0].speculation is None


def test_pages_stay_on_their_stages(on_mesh: OnMesh) -> None:
    with pytest.raises(InvalidArgument, match="cut over several devices cannot leave them"):
        on_mesh("llama", {"pipeline": 2}, host_pages=4)
    model = on_mesh("llama", {"pipeline": 2})
    with pytest.raises(NotSupported, match="stay where they are"):
        model.driver.save("m", 0, [0], lambda index, data: None)


def test_more_stages_than_layers_are_refused(on_mesh: OnMesh) -> None:
    with pytest.raises(InvalidArgument, match="pipeline is 4, but the model has 2 layers"):
        on_mesh("llama", {"pipeline": 4})


def test_8_bits_are_those_of_one_device(on_mesh: OnMesh) -> None:
    precision = {"weights": "int8", "kv_dtype": "int8"}
    tokens = [on_mesh("llama", mesh, **precision).run()[0] for mesh in ({}, {"pipeline": 2})]
    assert tokens[0] == tokens[1]

"""What a step computes, and for which tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.extend
import numpy as np
import pytest

from llmos.drivers.jax.decoder import forward
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import LoadRequest
from tests.drivers.jax.conftest import TINY, random_tensors, write_folder

CHUNK, LAYERS = 32, 3


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of three layers, and what its programs take."""
    config = TINY | {"num_hidden_layers": LAYERS}
    folder = write_folder(tmp_path_factory.mktemp("three"), config, random_tensors(config))
    driver = JaxDriver("cpu", attention="xla")
    request = LoadRequest(model="m", source=str(folder), pages=8, slots=2, chunk_tokens=CHUNK, max_context=64)
    driver.load(request, lambda _: None)
    yield driver._engines["m"][0].programs.spec
    driver.unload("m")


def products(program: Any, *arguments: Any) -> list[tuple[int, int]]:
    """(rows, outputs) of every product of activations with a weight, in all calls."""
    found: list[tuple[int, int]] = []

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general" and equation.outvars[0].aval.ndim == 2:
                found.append(equation.outvars[0].aval.shape)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(program)(*arguments).jaxpr)
    return found


def test_of_a_prompt_the_last_layer_goes_on_with_its_last_token(spec: Any) -> None:
    shape = replace(spec.shape, native=False)
    width = spec.batch.tables.shape[1]
    chunk = jax.ShapeDtypeStruct((2, forward.heading(False) + width + CHUNK), np.int32)
    found = products(partial(forward.prefill, shape, False, width), spec.weights, spec.caches, chunk)
    gate_up, down = 2 * TINY["intermediate_size"], TINY["hidden_size"]
    assert found.count((2 * CHUNK, gate_up)) == LAYERS - 1
    assert found.count((2, gate_up)) == 1
    assert found.count((2, down)) == 2, "what attention mixed, and what the MLP makes of it"
    assert found.count((2, TINY["vocab_size"])) == 1


def test_the_smallest_program_for_prompts_is_told_where_nothing_rides_along(spec: Any) -> None:
    assert spec.mixed == ([], [])
    assert spec.least_chunk == spec.chunk_sizes[0] == CHUNK
    assert replace(spec, mixed=([2], [4])).least_chunk == 0

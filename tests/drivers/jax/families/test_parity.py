"""Every decoder family computes what transformers computes, for its checkpoints as they are published.

The fixtures in ``tests/data/families`` are small random checkpoints with the logits of transformers in
float32; ``make_fixtures.py`` records them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from llmos.drivers.jax import families, platform
from llmos.drivers.jax.attention.plans import DecodePlan, PrefillPlan
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import rope
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import Decoder, abstract
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.source import open_source
from llmos.drivers.sdk.messages import LoadRequest

DATA = Path(__file__).parents[3] / "data" / "families"
DECODERS = "gemma2 gemma3 gpt2 llama mistral mixtral phi3 phi4 phi4_long qwen2 qwen3 qwen3_moe".split()  # noqa: SIM905
PAGE_TOKENS, CHUNK = 4, 10
SHORT = {"phi4": 64}
"""The context that a model is loaded for, where it is less than its longest."""
TOLERANCE = 5e-5
"""Of float32 logits, which reach 4 to 8; transformers itself is 1e-5 off its float64, and taking one GELU
for the other, the smallest mistake tried, is off by 1e-3."""


@pytest.fixture(scope="module", autouse=True)
def kept_programs(programs_folder: Path) -> None:
    platform.keep_programs(str(programs_folder))


def read(folder: Path, dtype: Any = jnp.float32) -> tuple[DecoderConfig, Any]:
    """The configuration of a checkpoint, and its decoder."""
    source = open_source(str(folder))
    family = families.find(source)
    config = family.configure[source.format](source)
    config = rope.for_context(config, SHORT.get(folder.name, config.max_positions))
    shapes = parameters.parameters(config, dtype, OneDevice(jax.devices()[0]))[-1]
    weights = convert(source, family, config, shapes, lambda _, x: jnp.asarray(x), lambda *_: None)
    graph, tree = nnx.split(Decoder(config, abstract(dtype)))
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)]
    state = jax.tree.unflatten(jax.tree.structure(tree), [weights[path] for path in paths])
    return config, nnx.merge(graph, state)


@partial(jax.jit, static_argnums=0)
def apply(graph: Any, state: Any, cache: Any, x: Any, turn: Any, plan: Any) -> Any:
    """One layer; those that are alike share a compiled program."""
    backend = XlaAttention(tokens_in_flight=16)
    attend: Callable[..., Any] = backend.decode if isinstance(plan, DecodePlan) else backend.prefill
    bound = lambda new, scoring: attend(plan, cache, *new.parts(), scoring=scoring)  # noqa: E731
    return nnx.merge(graph, state)(x, turn, bound)


def step(model: Any, caches: Any, tokens: np.ndarray, position: np.ndarray, plan: Any) -> Any:
    """Feed tokens, all together or one, and give the logits after each of them."""
    x, updated = model.embed(jnp.asarray(tokens), jnp.asarray(position)), []
    turns = model.turns(jnp.asarray(position))
    for layer, cache in zip(model.layers, caches, strict=True):
        x, cache = apply(*nnx.split(layer), cache, x, turns[layer.rope], plan)
        updated.append(cache)
    return np.asarray(model.logits(x)), updated


def run(folder: Path, tokens: np.ndarray, dtype: Any = jnp.float32) -> np.ndarray:
    """Logits after each token: two chunks of prefill, then one token at a time."""
    config, model = read(folder, dtype)
    pages = -(-len(tokens) // PAGE_TOKENS)
    table = np.random.default_rng(0).permutation(pages)
    caches = XlaAttention().allocate(config, pages + 1, PAGE_TOKENS, dtype)
    tables = jnp.asarray([[*table, *[pages] * (16 - pages)]], jnp.int32)
    found = []
    for first in (0, CHUNK):
        chunk = np.arange(first, first + CHUNK)
        where = (jnp.asarray(table[chunk // PAGE_TOKENS])[None], jnp.asarray(chunk % PAGE_TOKENS)[None])
        prefill = PrefillPlan(tables, jnp.asarray([first]), jnp.asarray([first + CHUNK]), *where)
        logits, caches = step(model, caches, tokens[chunk][None], chunk[None], prefill)
        found += list(logits[0])
    for at in range(2 * CHUNK, len(tokens)):
        where = (jnp.asarray([table[at // PAGE_TOKENS]]), jnp.asarray([at % PAGE_TOKENS]))
        decode = DecodePlan(tables, jnp.asarray([at + 1]), *where)
        logits, caches = step(model, caches, tokens[at : at + 1], np.asarray([at]), decode)
        found.append(logits[0])
    return np.stack(found)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name: str) -> None:
    expected = load_file(DATA / name / "expected.tensors")
    found = run(DATA / name, expected["tokens"])
    error = float(np.abs(found - expected["logits"]).max())
    print(f"{name}: largest error {error:.1e} of logits up to {np.abs(expected['logits']).max():.1f}")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_engine_continues_as_transformers_does(name: str, helpers: Any, cache_folder: Path) -> None:
    expected = load_file(DATA / name / "expected.tensors")
    driver = JaxDriver("cpu")
    request = LoadRequest(
        model=name, source=str(DATA / name), cache=str(cache_folder),
        page_tokens=4, pages=16, slots=1, max_context=64, chunk_tokens=16,
    )  # fmt: skip
    runner = helpers.Runner(driver, driver.load(request, helpers.ignore))
    greedy = expected["greedy"].tolist()
    task = helpers.Task(expected["tokens"].tolist(), len(greedy))
    assert runner.run(task) == [greedy]

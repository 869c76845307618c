"""The callbacks: describe, load with its refusals and its caches, unload."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import LoadProgress, LoadRequest
from llmos.ipc.errors import InvalidArgument, NoMemory, NotFound

PROMPT = list(range(3, 40))


def request(source: Path, cache: Path | str = "", **fields: Any) -> LoadRequest:
    small = {"page_tokens": 8, "pages": 64, "slots": 1, "max_context": 128, "chunk_tokens": 32}
    return LoadRequest(model="m", source=str(source), cache=str(cache), **(small | fields))


def generated(helpers: Any, driver: JaxDriver, loaded: Any) -> list[int]:
    return list(helpers.Runner(driver, loaded).run(helpers.Task(PROMPT, 8))[0])


def test_describe_names_the_devices() -> None:
    info = JaxDriver("cpu").describe()
    assert info.driver == "jax"
    assert info.devices[0].kind == "cpu"
    assert info.devices[0].memory > 1 << 20
    assert info.dtypes == ["float32", "bfloat16", "int8", "float8"]


def test_the_second_load_restores_instead_of_converting(
    fresh_cache: Path, helpers: Any, tiny_folder: Path, tiny_tensors: Any
) -> None:
    driver = JaxDriver("cpu")
    phases = []
    for _ in range(2):
        loaded = driver.load(request(tiny_folder, fresh_cache), helpers.ignore)
        phases.append(set(loaded.phases))
        assert generated(helpers, driver, loaded) == helpers.dense_greedy(
            helpers.TINY, tiny_tensors, PROMPT, 8
        )
        driver.unload("m")
    assert {"convert", "save"} <= phases[0]
    assert "restore" not in phases[0]
    assert "restore" in phases[1]
    assert "convert" not in phases[1]
    kept = next((fresh_cache / "weights").iterdir())
    loaded = driver.load(request(kept), helpers.ignore)
    assert "restore" in loaded.phases


def test_a_damaged_cache_is_converted_again_with_a_warning(
    fresh_cache: Path, helpers: Any, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = JaxDriver("cpu")
    driver.load(request(tiny_folder, fresh_cache), helpers.ignore)
    driver.unload("m")
    kept = next((fresh_cache / "weights").iterdir())
    data = max((path for path in kept.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        loaded = driver.load(request(tiny_folder, fresh_cache), helpers.ignore)
    assert "convert" in loaded.phases
    assert "dropping converted weights" in caplog.text
    driver.unload("m")
    (kept / "manifest.json").write_text("{")
    loaded = driver.load(request(tiny_folder, fresh_cache), helpers.ignore)
    assert "convert" in loaded.phases


def test_an_untied_gguf_model_in_bfloat16(tmp_path: Path, fresh_cache: Path, helpers: Any) -> None:
    config = helpers.TINY | {"tie_word_embeddings": False}
    path = helpers.write_gguf(tmp_path / "m.gguf", config, helpers.random_tensors(config))
    driver = JaxDriver("cpu")
    loaded = driver.load(request(path, fresh_cache, dtype="bfloat16", kv_dtype="bfloat16"), helpers.ignore)
    assert loaded.weight_bytes == 2 * loaded.parameters
    assert loaded.page_bytes == 8 * 2 * 2 * 16 * 2
    assert loaded.stop_tokens == [2]
    assert len(generated(helpers, driver, loaded)) == 8


def test_steps_neither_copy_nor_convert_a_bfloat16_cache(
    helpers: Any, tiny_folder: Path, cache_folder: Path
) -> None:
    driver = JaxDriver("cpu")
    halves = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "pages": 4096}
    driver.load(request(tiny_folder, cache_folder, **halves), helpers.ignore)
    (engine,) = driver._engines["m"]
    leaves = jax.tree.leaves(engine.replica.caches)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.uint16)}
    size = sum(leaf.nbytes for leaf in leaves)
    for key in [("decode", 1), ("prefill", 1, engine.programs.spec.chunk_sizes[-1], False), ("scrub",)]:
        memory = engine.programs.get(key).memory_analysis()
        assert (memory.alias_size_in_bytes, memory.temp_size_in_bytes < size // 8) == (size, True), key


def test_the_driver_chooses_pages(helpers: Any, tiny_folder: Path, cache_folder: Path) -> None:
    loaded = JaxDriver("cpu").load(request(tiny_folder, cache_folder, pages=0), helpers.ignore)
    assert loaded.pages == 128 // 8


def test_progress_is_told_at_least_once_a_second(helpers: Any, fresh_cache: Path, tiny_folder: Path) -> None:
    seen: list[tuple[float, LoadProgress]] = []
    JaxDriver("cpu").load(
        request(tiny_folder, fresh_cache), lambda step: seen.append((time.monotonic(), step))
    )
    assert {"read", "compile"} <= {step.phase for _, step in seen}
    assert seen[-1][1].done == seen[-1][1].total


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"dtype": "int8"}, InvalidArgument),
        ({"dtype": "float8", "weights": "float8"}, InvalidArgument),
        ({"mesh": {"tensor": 1024}}, InvalidArgument),
        ({"slots": 0}, InvalidArgument),
        ({"page_tokens": 0}, InvalidArgument),
        ({"max_context": 1}, InvalidArgument),
        ({"memory_fraction": 0.0}, InvalidArgument),
        ({"pages": 3}, NoMemory),
        ({"pages": 1 << 24}, NoMemory),
        ({"source": "nowhere"}, NotFound),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    helpers: Any, tiny_folder: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    driver = JaxDriver("cpu")
    with pytest.raises(error):
        driver.load(request(fields.pop("source", tiny_folder), **fields), helpers.ignore)
    with pytest.raises(NotFound):
        driver.unload("m")


def test_a_bad_tensor_stops_the_load(helpers: Any, tmp_path: Path, fresh_cache: Path) -> None:
    tensors = helpers.random_tensors(helpers.TINY)
    tensors["model.norm.weight"][3] = float("nan")
    folder = helpers.write_folder(tmp_path / "bad", helpers.TINY, tensors)
    with pytest.raises(InvalidArgument, match=r"'model\.norm\.weight'"):
        JaxDriver("cpu").load(request(folder, fresh_cache), helpers.ignore)
    assert not list((fresh_cache / "weights").glob("*"))


def test_a_model_is_loaded_once(tiny_driver: Any, helpers: Any, tiny_folder: Path) -> None:
    driver, loaded = tiny_driver
    again = LoadRequest(model=loaded.model, source=str(tiny_folder))
    with pytest.raises(InvalidArgument, match="loaded already"):
        driver.load(again, helpers.ignore)

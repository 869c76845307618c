"""Safetensors folders: shards, dtypes, and damage refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmos.drivers.jax.weights.safetensors import SafetensorsSource
from llmos.ipc.errors import InvalidArgument

VALUES = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_floating_types_are_read(tmp_path: Path, helpers: Any, dtype: Any) -> None:
    folder = helpers.write_folder(tmp_path, {}, {"a": VALUES.astype(dtype)})
    np.testing.assert_array_equal(SafetensorsSource(folder).read("a"), VALUES.astype(dtype))


def test_shards_make_one_set(tmp_path: Path, helpers: Any) -> None:
    tensors = {f"t{i}": VALUES + i for i in range(7)}
    source = SafetensorsSource(helpers.write_folder(tmp_path, {"x": 1}, tensors, shards=3))
    for name, value in tensors.items():
        assert source.shape(name) == (6, 64)
        np.testing.assert_array_equal(source.read(name), value)
    assert source.shape("t7") is None


def test_generation_config_yields_to_config(tmp_path: Path, helpers: Any) -> None:
    helpers.write_folder(tmp_path, {"x": 1}, {"a": VALUES})
    (tmp_path / "generation_config.json").write_text('{"x": 2, "eos_token_id": [5, 6]}')
    assert SafetensorsSource(tmp_path).config == {"x": 1, "eos_token_id": [5, 6]}


def test_a_tensor_of_a_missing_shard_is_named(tmp_path: Path, helpers: Any) -> None:
    helpers.write_folder(tmp_path, {}, {f"t{i}": VALUES for i in range(3)}, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidArgument, match="'t1'"):
        SafetensorsSource(tmp_path)


def test_a_truncated_tensor_is_refused_by_name(tmp_path: Path, helpers: Any) -> None:
    file = helpers.write_folder(tmp_path, {}, {"a": VALUES, "b": VALUES}) / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InvalidArgument, match="'b' is cut off"):
        SafetensorsSource(tmp_path).read("b")


def test_integers_are_refused_by_name(tmp_path: Path, helpers: Any) -> None:
    source = SafetensorsSource(helpers.write_folder(tmp_path, {}, {"a": np.arange(4)}))
    with pytest.raises(InvalidArgument, match="'a' is in I64"):
        source.read("a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"123",
        (1 << 60).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (5).to_bytes(8, "little") + b"{oops",
        (8).to_bytes(8, "little") + b'{"a":{}}',
    ],
)
def test_an_unsound_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidArgument, match="not a sound safetensors file"):
        SafetensorsSource(tmp_path)


def test_offsets_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InvalidArgument, match="'a' has 8 bytes"):
        SafetensorsSource(tmp_path).read("a")


@pytest.mark.parametrize("config", [None, "[]", "{"])
def test_a_folder_needs_a_sound_config(tmp_path: Path, config: str | None) -> None:
    save_file({"a": VALUES}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        SafetensorsSource(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"no \.safetensors"):
        SafetensorsSource(tmp_path)

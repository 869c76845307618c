"""Conversion: every format gives the same parameters, and a bad tensor is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax import families
from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.source import open_source
from llmos.ipc.errors import InvalidArgument, NotFound

Q = "model.layers.1.self_attn.q_proj.weight"


def converted(path: Path, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    source = open_source(str(path))
    family = families.find(source)
    config = family.configure[source.format](source)
    _, _, shapes = parameters.parameters(config, dtype, OneDevice(jax.devices()[0]))
    weights = convert(source, family, config, shapes, lambda _, x: jnp.asarray(x), lambda *_: None)
    return {name: np.asarray(value) for name, value in weights.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_and_safetensors_agree(tmp_path: Path, helpers: Any, tied: bool) -> None:
    config = helpers.TINY | {"tie_word_embeddings": tied}
    tensors = helpers.random_tensors(config)
    one = converted(helpers.write_folder(tmp_path / "folder", config, tensors, shards=2))
    other = converted(helpers.write_gguf(tmp_path / "m.gguf", config, tensors))
    assert ("head.weight" in one) is not tied
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_projections_are_fused_in_order(tiny_folder: Path, tiny_tensors: Any) -> None:
    weights = converted(tiny_folder)
    parts = [tiny_tensors[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    np.testing.assert_array_equal(weights["layers.1.attention.qkv.weight"], np.concatenate(parts))
    parts = [tiny_tensors[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    np.testing.assert_array_equal(weights["layers.0.mlp.gate_up.weight"], np.concatenate(parts))


def test_values_are_rounded_to_the_dtype(tiny_folder: Path) -> None:
    assert {value.dtype for value in converted(tiny_folder, jnp.bfloat16).values()} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"'{Q}' is missing"),
        (lambda t: t.update({Q: t[Q][:, :-1].copy()}), f"'{Q}' has shape"),
        (lambda t: t.update({Q: t[Q].T.reshape(-1).copy()}), f"'{Q}' has shape"),
        (lambda t: t[Q].__setitem__((3, 3), np.nan), f"'{Q}' holds values that are not finite"),
        (lambda t: t[Q].__setitem__((0, 0), np.inf), f"'{Q}' holds values that are not finite"),
    ],
    ids=["missing", "narrow", "flat", "nan", "inf"],
)
def test_a_bad_tensor_is_refused_by_name(tmp_path: Path, helpers: Any, change: Any, message: str) -> None:
    tensors = helpers.random_tensors(helpers.TINY)
    change(tensors)
    with pytest.raises(InvalidArgument, match=message):
        converted(helpers.write_folder(tmp_path, helpers.TINY, tensors))


def test_a_truncated_gguf_tensor_is_refused_by_name(tmp_path: Path, helpers: Any, tiny_tensors: Any) -> None:
    path = helpers.write_gguf(tmp_path / "m.gguf", helpers.TINY, tiny_tensors)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InvalidArgument, match=r"'blk\.1.ffn_down\.weight' is cut off"):
        converted(path)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_source(str(tmp_path / "nothing"))
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(InvalidArgument, match="neither"):
        open_source(str(tmp_path / "x.bin"))

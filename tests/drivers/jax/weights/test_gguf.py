"""GGUF files: what is read equals what was written, and damage is refused by the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.drivers.jax.weights.gguf import GGUFSource
from llmos.ipc.errors import InvalidArgument

VALUES = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType | None]]) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(5000)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 5000)
    writer.add_array("small", [1.5, 2.5])
    writer.add_string("name", "ü")
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_quantized_tensors_are_dequantized(tmp_path: Path, kind: str) -> None:
    form = GGMLQuantizationType[kind]
    packed = quantize(VALUES, form)
    source = GGUFSource(write(tmp_path / "m.gguf", {"a": (packed, form), "b": (VALUES, None)}))
    assert source.shape("a") == (6, 64)
    np.testing.assert_array_equal(source.read("a"), dequantize(packed, form))
    np.testing.assert_array_equal(source.read("b"), VALUES)


def test_half_precision_is_read(tmp_path: Path) -> None:
    source = GGUFSource(write(tmp_path / "m.gguf", {"a": (VALUES.astype(np.float16), None)}))
    np.testing.assert_array_equal(source.read("a"), VALUES.astype(np.float16))


def test_metadata_is_read_and_the_tokenizer_skipped(tmp_path: Path) -> None:
    config = GGUFSource(write(tmp_path / "m.gguf", {"a": (VALUES, None)})).config
    assert config["general.architecture"] == "llama"
    assert config["llama.block_count"] == 3
    assert config["small"] == [1.5, 2.5]
    assert config["name"] == "ü"
    assert config["tokenizer.ggml.tokens"] is None
    assert config["tokenizer.ggml.token_type"] is None


def test_a_truncated_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"first": (VALUES, None), "last": (VALUES, None)})
    path.write_bytes(path.read_bytes()[:-100])
    source = GGUFSource(path)
    np.testing.assert_array_equal(source.read("first"), VALUES)
    with pytest.raises(InvalidArgument, match="'last' is cut off"):
        source.read("last")


@pytest.mark.parametrize("size", [5, 24, 200, 3000, 60000])
def test_a_truncated_header_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "m.gguf", {"a": (VALUES, None)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InvalidArgument):
        GGUFSource(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_headers_never_crash(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = write(tmp_path_factory.mktemp("gguf") / "m.gguf", {"a": (VALUES, None)})
    content = bytearray(path.read_bytes())
    places = st.integers(0, 300) | st.integers(len(content) - 1800, len(content) - 1500)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = GGUFSource(path)
        if source.shape("a") is not None:
            source.read("a")
    except InvalidArgument:
        pass

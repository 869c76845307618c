"""Kept weights: restored exactly, never from a save that was killed, and never when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.weights import checkpoint
from llmos.ipc.errors import InvalidArgument

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
    rope_factors=(1.0, 2.0, 3.0, 4.0),
    stop_tokens=(2, 5),
)
WEIGHTS = {
    "layers.0.a": np.arange(6000, dtype=np.float32).reshape(60, 100),
    "embedding": np.linspace(0, 1, 64).astype(jnp.bfloat16).reshape(8, 8),
}


def shapes() -> dict[str, object]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: struct(value.shape, value.dtype, place) for name, value in WEIGHTS.items()}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    checkpoint.save(folder, "llama", CONFIG, {name: jnp.asarray(x) for name, x in WEIGHTS.items()})
    return folder


def test_weights_and_configuration_come_back(kept: Path) -> None:
    family, config, known = checkpoint.read_manifest(kept)
    assert (family, config) == ("llama", CONFIG)
    assert {name: (x.shape, x.dtype) for name, x in known.items()} == {
        name: (x.shape, x.dtype) for name, x in WEIGHTS.items()
    }
    for name, value in checkpoint.restore(kept, shapes()).items():
        np.testing.assert_array_equal(value, WEIGHTS[name])
        assert value.dtype == WEIGHTS[name].dtype


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_an_altered_file_is_refused(kept: Path) -> None:
    path = largest(kept)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="damaged"):
        checkpoint.restore(kept, shapes())


def test_a_truncated_file_is_refused(kept: Path) -> None:
    path = largest(kept)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InvalidArgument, match="damaged"):
        checkpoint.restore(kept, shapes())


def test_a_missing_file_is_refused(kept: Path) -> None:
    largest(kept).unlink()
    with pytest.raises(InvalidArgument, match="damaged"):
        checkpoint.restore(kept, shapes())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 2, "family": "llama"}'])
def test_a_bad_manifest_is_refused(kept: Path, text: str) -> None:
    (kept / "manifest.json").write_text(text)
    with pytest.raises(InvalidArgument, match="damaged"):
        checkpoint.read_manifest(kept)


def test_a_killed_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    program = (
        "import os, sys, jax.numpy as jnp\n"
        "from pathlib import Path\n"
        "from llmos.drivers.jax.weights import checkpoint\n"
        "checkpoint._crc = lambda path, start: os.kill(os.getpid(), 9)\n"
        "from llmos.drivers.jax.decoder.config import DecoderConfig\n"
        "config = DecoderConfig(8, 32, 1, 4, 2, 8, 8, 1e-5, 1e4, 64)\n"
        "checkpoint.save(Path(sys.argv[1]), 'llama', config, {'a': jnp.ones((4, 4))})\n"
    )
    folder = tmp_path / "kept"
    killed = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, check=False)
    assert killed.returncode == -9
    assert not checkpoint.is_checkpoint(str(folder))
    checkpoint.save(folder, "llama", CONFIG, {name: jnp.asarray(x) for name, x in WEIGHTS.items()})
    assert checkpoint.restore(folder, shapes()).keys() == WEIGHTS.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_key_follows_content_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    key = checkpoint.key_of(str(path), "float32")
    assert key == checkpoint.key_of(str(path), "float32")
    assert key != checkpoint.key_of(str(path), "bfloat16")
    path.write_bytes(b"GGUF2")
    assert key != checkpoint.key_of(str(path), "float32")

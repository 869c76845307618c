"""Adapters from PEFT's folders: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmos.drivers.jax.adapters.adapters import Room, targets
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.weights import peft
from llmos.ipc.errors import InvalidArgument, NotFound
from tests.drivers.jax.lora_files import PREFIX, Tensors, make_adapter, write_adapter

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
CONFIG = DecoderConfig(
    vocab_size=101, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, norm_eps=1e-5,
    rope_theta=1e4, max_positions=64,
)  # fmt: skip
ROOM = Room(CONFIG, 8, jnp.float32, (), (), (None, None))
LAYER = f"{PREFIX}model.layers.1."


def read(folder: Path, room: Room = ROOM) -> tuple[int, dict[str, Any]]:
    rank, pairs = peft.read(folder, room)
    return rank, dict(zip(targets(room.config), pairs, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    modules = ["k_proj", "up_proj", "o_proj"]
    return write_adapter(tmp_path / "a", make_adapter(SIZES, 4, modules), 4, 16, modules)


def tensors_of(folder: Path) -> Tensors:
    return dict(load_file(folder / "adapter_model.safetensors"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_parts_of_fused_products_lie_where_they_belong_scaled_and_padded(folder: Path) -> None:
    rank, found = read(folder)
    tensors = tensors_of(folder)
    assert rank == 4
    a, b = found["layers.1.attention.qkv"]
    np.testing.assert_array_equal(a[8:12], tensors[f"{LAYER}self_attn.k_proj.lora_A.weight"])
    np.testing.assert_array_equal(b[32:48, :4], 4 * tensors[f"{LAYER}self_attn.k_proj.lora_B.weight"])
    assert not a[:8].any()
    assert not a[12:].any()
    assert not b[:32].any()
    assert not b[48:].any()
    assert not b[:, 4:].any()
    a, b = found["layers.1.mlp.gate_up"]
    np.testing.assert_array_equal(b[48:, :4], 4 * tensors[f"{LAYER}mlp.up_proj.lora_B.weight"])
    assert not b[:48].any()
    assert not found["layers.0.mlp.down"][1].any()


def test_a_scale_by_the_root_of_the_rank(folder: Path) -> None:
    change(folder, use_rslora=True)
    own = tensors_of(folder)[f"{LAYER}self_attn.o_proj.lora_B.weight"]
    np.testing.assert_allclose(read(folder)[1]["layers.1.attention.out"][1][:, :4], 8 * own, rtol=1e-6)


def test_a_tensor_that_is_fused_in_the_file_is_for_all_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = f"{PREFIX}model.layers.0.self_attn.qkv_proj"
    a, b = rng.standard_normal((2, 32)), rng.standard_normal((64, 2))
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    found = read(write_adapter(tmp_path / "f", tensors, 2, 2, ["qkv_proj"]))[1]["layers.0.attention.qkv"]
    for part in range(3):
        np.testing.assert_allclose(found[0][part * 8 : part * 8 + 2], a, rtol=1e-6)
    np.testing.assert_allclose(found[1][:, :2], b, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "has biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3 is not LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's weights"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 64}, "over 8: raise adapter_rank"),
        ({"target_modules": ["k_proj", "up_proj", "o_proj", "q_proj"]}, "names q_proj"),
    ],
)
def test_what_is_not_plain_lora_is_refused(fields: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **fields)
    with pytest.raises(InvalidArgument, match=message):
        read(folder)


O_A, O_B = (f"{LAYER}self_attn.o_proj.lora_{which}.weight" for which in "AB")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (O_A, np.zeros((4, 31), np.float32), rf"'{O_A}' has shape \[4, 31\], expected \[4, 32\]"),
        (O_B, np.full((32, 4), np.nan, np.float32), f"'{O_B}' holds values that are not finite"),
        (O_B, None, f"'{O_B}' is missing"),
        (f"{PREFIX}lm_head.lora_A.weight", np.zeros((4, 32)), "lm_head.lora_A.weight' is for no module"),
        (f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight", np.zeros((4, 32)), "layers.9.*no module"),
        (f"{PREFIX}model.layers.0.mlp.router.lora_A.weight", np.zeros((4, 32)), "router.*no module"),
        (f"{PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector", np.zeros(4), "magnitude.*no module"),
    ],
)
def test_a_wrong_tensor_is_refused_by_its_name(
    name: str, value: np.ndarray | None, message: str, folder: Path
) -> None:
    tensors = tensors_of(folder)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgument, match=message):
        read(folder)


def test_a_file_that_is_cut_off_is_refused_by_the_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InvalidArgument, match=r"tensor '.*lora_.*' is cut off"):
        read(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidArgument, match="header is cut off"):
        read(folder)
    path.unlink()
    with pytest.raises(InvalidArgument, match="has no adapter_model"):
        read(folder)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no adapter at"):
        read(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="has no adapter_config"):
        read(tmp_path)

"""Random LoRA adapters as PEFT saves them, and weights with one merged into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
BLOCK = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
PREFIX = "base_model.model."


def make_adapter(config: dict[str, Any], rank: int, modules: list[str], seed: int = 0) -> Tensors:
    """Random A and B under PEFT's names, large enough to change what is said."""
    rng = np.random.default_rng(100 + seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden), "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    made = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            out, into = shapes[module]
            at = f"{PREFIX}model.layers.{layer}.{BLOCK.get(module, 'self_attn')}.{module}"
            a, b = rng.standard_normal((rank, into)), rng.standard_normal((out, rank))
            made[f"{at}.lora_A.weight"] = (a / np.sqrt(into)).astype(np.float32)
            made[f"{at}.lora_B.weight"] = (b / np.sqrt(rank)).astype(np.float32)
    return made


def write_adapter(
    folder: Path, tensors: Tensors, rank: int, alpha: float, modules: list[str], **fields: Any
) -> Path:
    """A folder as ``PeftModel.save_pretrained`` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none",
        "use_dora": False, "use_rslora": False, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(weights: Tensors, adapter: Tensors, scale: float) -> Tensors:
    """W + scale * B A for every module of the adapter, as ``merge_and_unload`` computes it."""
    made = dict(weights)
    for name, a in adapter.items():
        if ".lora_A." in name:
            module = name.removeprefix(PREFIX).replace(".lora_A", "")
            made[module] = made[module] + scale * adapter[name.replace("lora_A", "lora_B")] @ a
    return made


SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536,
}  # fmt: skip
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
RANK, ALPHA = 8, 4
PROMPT = "The lighthouse keeper opened the door and"


def smollm2_adapter() -> Tensors:
    """A random adapter for SmolLM2-135M that changes what it says, and leaves it language."""
    made = make_adapter(SMOLLM2, RANK, MODULES)
    return {name: value * np.float32(0.2 if "lora_B" in name else 1) for name, value in made.items()}

"""Each family's GGUF files give the parameters that its Hugging Face checkpoints give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFWriter

from llmos.drivers.jax import families
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.source import Source, open_source
from llmos.ipc.errors import InvalidArgument

DATA = Path(__file__).parents[3] / "data" / "families"
NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate.": "ffn_gate_inp.",
    "block_sparse_moe.gate.": "ffn_gate_inp.",
    "mlp.": "ffn_",
    "_proj": "",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "transformer.h.": "blk.",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
"""What llama.cpp's converter replaces in names, in this order; norms after attention are below."""
PLAIN_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
KINDS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def tensors_of(name: str) -> dict[str, np.ndarray]:
    source: Any = open_source(str(DATA / name))
    return {key: source.read(key).astype(np.float32) for key in source._tensors}


def translated(name: str, architecture: str, config: DecoderConfig) -> dict[str, np.ndarray]:
    """A checkpoint's tensors as llama.cpp's converter names and changes them."""
    made: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key, value in sorted(tensors_of(name).items()):
        if match := EXPERT.fullmatch(key):
            layer, _, kind = match.groups()
            experts.setdefault(f"blk.{layer}.ffn_{KINDS[kind]}_exps.weight", []).append(value)
            continue
        new = key
        gemma = architecture.startswith("gemma")
        for old, other in {**NAMES, **(GEMMA_NORMS if gemma else PLAIN_NORMS)}.items():
            new = new.replace(old, other)
        if gemma and new.endswith("norm.weight"):
            value = value + 1
        if architecture == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", new):
            value = np.ascontiguousarray(value.T)
        if architecture == "llama" and (part := re.search(r"attn_([qk])\.weight", new)):
            heads = config.heads if part[1] == "q" else config.kv_heads
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        made[new] = value
    return made | {key: np.stack(values) for key, values in experts.items()}


def write(
    path: Path, architecture: str, config: DecoderConfig, tensors: dict[str, np.ndarray], scaling: str = ""
) -> Path:
    writer = GGUFWriter(path, architecture)
    if scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    if config.rope_long_factors:
        writer.add_rope_scaling_orig_ctx_len(config.rope_original)
        writer.add_rope_scaling_attn_factors(config.rope_scale)
        writer.add_tensor("rope_factors_short.weight", np.asarray(config.rope_factors, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.asarray(config.rope_long_factors, np.float32))
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(config.stop_tokens[0])
    (writer.add_layer_norm_eps if config.norm == "layer" else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if config.windows:
        writer.add_sliding_window(max(config.windows))
    if config.attention_cap:
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.logit_cap)
    if config.experts:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.active_experts)
        writer.add_expert_feed_forward_length(config.expert_intermediate)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(source: Source) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    family = families.find(source)
    config = family.configure[source.format](source)
    shapes = parameters.parameters(config, jnp.float32, OneDevice(jax.devices()[0]))[-1]
    weights = convert(source, family, config, shapes, lambda _, x: jnp.asarray(x), lambda *_: None)
    return config, {name: np.asarray(value) for name, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "architecture", "different"),
    [
        ("mistral", "llama", {"windows"}),
        ("mixtral", "llama", set()),
        ("qwen2", "qwen2", set()),
        ("qwen3", "qwen3", set()),
        ("gemma2", "gemma2", {"attention_scale"}),
        ("gemma3", "gemma3", {"attention_scale", "rope_factors"}),
        ("phi3", "phi3", set()),
        ("phi4", "phi3", set()),
        ("gpt2", "gpt2", set()),
    ],
)
def test_gguf_gives_the_same_model(tmp_path: Path, name: str, architecture: str, different: set[str]) -> None:
    config, weights = converted(open_source(str(DATA / name)))
    path = write(tmp_path / "m.gguf", architecture, config, translated(name, architecture, config))
    other_config, other = converted(open_source(str(path)))
    pairs = {key: (value, getattr(other_config, key)) for key, value in vars(config).items()}
    unequal = {key for key, (one, two) in pairs.items() if one != pytest.approx(two)}
    assert unequal == different
    assert weights.keys() == other.keys()
    for key, value in weights.items():
        np.testing.assert_allclose(other[key], value, atol=1e-6, err_msg=key)


def test_experts_in_tensors_of_their_own_are_read_too(tmp_path: Path) -> None:
    config, weights = converted(open_source(str(DATA / "mixtral")))
    tensors = translated("mixtral", "llama", config)
    for key in [key for key in tensors if "_exps" in key]:
        for index, value in enumerate(tensors.pop(key)):
            tensors[key.replace("_exps", f".{index}")] = value
    _, other = converted(open_source(str(write(tmp_path / "m.gguf", "llama", config, tensors))))
    for key, value in weights.items():
        np.testing.assert_array_equal(other[key], value)


def test_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config, _ = converted(open_source(str(DATA / "phi3")))
    tensors = translated("phi3", "phi3", config)
    path = write(tmp_path / "m.gguf", "phi3", config, tensors, scaling="yarn")
    with pytest.raises(InvalidArgument, match=r"yarn.*known: none, linear, longrope"):
        converted(open_source(str(path)))

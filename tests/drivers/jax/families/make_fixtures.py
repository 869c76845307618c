"""Records the fixtures of the family tests with transformers and torch, which the tests do not need.

Run it in an environment that has both: ``python tests/drivers/jax/families/make_fixtures.py [NAME ...]``.
Each fixture is a small random checkpoint as ``save_pretrained`` writes it, in bfloat16, and
``expected.safetensors`` with ``tokens`` [n], float32 ``logits`` [n, vocab] and the ``greedy`` continuation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[3] / "data" / "families"
LENGTH, GREEDY = 28, 12
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PHI4 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
    },
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "intermediate_size": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "phi4": ("Phi3", PHI4 | {"original_max_position_embeddings": 64}),
    "phi4_long": ("Phi3", PHI4 | {"original_max_position_embeddings": 16}),
    "gpt2": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 96, "eos_token_id": 2},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]}),
}


ENCODERS = {
    "bert": ("BertModel", {"type_vocab_size": 2}),
    "bert_pairs": ("BertForSequenceClassification", {"num_labels": 1}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "roberta_labels": (
        "RobertaForSequenceClassification",
        {"num_labels": 3, "pad_token_id": 1, "type_vocab_size": 1},
    ),
}


def randomise(model: Any) -> None:
    """Weights that spread logits out and make every bias and norm matter, rounded to bfloat16."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
        else:
            inner = parameter.shape[-2] if "c_" in name else parameter.shape[-1]
            parameter.data = torch.randn_like(parameter) * 1.5 / inner**0.5
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)


def record_decoder(name: str) -> None:
    """One decoder's fixture."""
    kind, changes = DECODERS[name]
    sizes = {} if kind == "GPT2" else SIZES
    settings = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    config = settings(**(sizes | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        config
    ).eval()
    randomise(model)
    tokens = torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
        known = tokens
        for _ in range(GREEDY):
            known = torch.cat([known, model(known).logits[:, -1:].argmax(-1)], dim=1)
    store(name, model, {"tokens": tokens[0].int(), "logits": logits, "greedy": known[0, LENGTH:].int()})


def record_encoder(name: str) -> None:
    """One encoder's fixture: a padded batch of three texts."""
    kind, changes = ENCODERS[name]
    settings = transformers.BertConfig if kind.startswith("Bert") else transformers.RobertaConfig
    config = settings(**(SIZES | {"max_position_embeddings": 40} | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    randomise(model)
    draw = torch.Generator().manual_seed(11)
    lengths = torch.tensor([12, 5, 9])
    mask = torch.arange(12) < lengths[:, None]
    tokens = torch.where(mask, torch.randint(3, 96, (3, 12), generator=draw), config.pad_token_id)
    types = (torch.arange(12) >= lengths[:, None] // 2) & mask & (config.type_vocab_size > 1)
    with torch.no_grad():
        found = model(tokens, attention_mask=mask.long(), token_type_ids=types.long())
    expected = {"tokens": tokens.int(), "types": types.int(), "lengths": lengths.int()}
    if kind.endswith("Model"):
        summed = (found.last_hidden_state * mask[..., None]).sum(1) / lengths[:, None]
        expected["mean"] = torch.nn.functional.normalize(summed)
        expected["cls"] = found.last_hidden_state[:, 0]
    else:
        expected["logits"] = found.logits
    store(name, model, expected)


def store(name: str, model: Any, expected: dict[str, Any]) -> None:
    """Write a fixture's folder."""
    folder = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.tensors")


if __name__ == "__main__":
    for name in sys.argv[1:] or [*DECODERS, *ENCODERS]:
        (record_decoder if name in DECODERS else record_encoder)(name)

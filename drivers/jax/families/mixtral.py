"""Mixtral: Mistral whose every layer is a mixture of experts (GGUF: see ``llama``)."""

from __future__ import annotations

from llmos.drivers.jax.decoder.config import DecoderConfig, require
from llmos.drivers.jax.families import Family, Rules
from llmos.drivers.jax.families.common import hf_fields, hf_windows
from llmos.drivers.jax.families.layout import HF, decoder_rules
from llmos.drivers.jax.weights.source import Source

_MOE = "model.layers.{}.block_sparse_moe"
_LAYOUT = HF.renamed(
    router=f"{_MOE}.gate",
    experts_gate=f"{_MOE}.experts.{{}}.w1",
    experts_up=f"{_MOE}.experts.{{}}.w3",
    experts_down=f"{_MOE}.experts.{{}}.w2",
)


def configure(source: Source) -> DecoderConfig:
    """Map a Hugging Face ``config.json``."""
    fields = hf_fields(source.config)
    return DecoderConfig(
        **fields,
        windows=hf_windows(source.config),
        experts=int(require(source.config, "num_local_experts")),
        active_experts=int(require(source.config, "num_experts_per_tok")),
        expert_intermediate=fields["intermediate"],
    )


def rules(config: DecoderConfig, source: Source) -> Rules:
    """Where each parameter comes from."""
    return decoder_rules(_LAYOUT, config)


FAMILIES = [
    Family(
        name="mixtral",
        architectures={"safetensors": ("MixtralForCausalLM",)},
        configure={"safetensors": configure},
        rules=rules,
    )
]

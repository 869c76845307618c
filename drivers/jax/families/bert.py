"""BERT and RoBERTa as encoders: sentence embedding, sequence classification, cross-encoder reranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmos.drivers.jax.decoder.config import require
from llmos.drivers.jax.decoder.modules import abstract
from llmos.drivers.jax.encoders.encoder import Encoder, EncoderConfig
from llmos.drivers.jax.families import Family, Part, Rules
from llmos.drivers.jax.families.common import activation
from llmos.drivers.jax.weights.convert import apply
from llmos.drivers.jax.weights.pooling import read_pooling
from llmos.drivers.jax.weights.safetensors import SafetensorsSource
from llmos.drivers.jax.weights.source import Source
from llmos.ipc.errors import InvalidArgument

ARCHITECTURES = {
    f"{family}{kind}": family.lower()
    for family in ("Bert", "Roberta", "XLMRoberta")
    for kind in ("Model", "ForMaskedLM", "ForSequenceClassification")
}
_PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlmroberta": "roberta."}
_HEADS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlmroberta": ("classifier.dense", "classifier.out_proj"),
}
_LAYER = {
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def find(source: Source) -> str:
    """The encoder's kind ("bert", "roberta", "xlmroberta"); another is refused with the known ones."""
    names = [str(name) for name in source.config.get("architectures") or ["(none)"]]
    kind = ARCHITECTURES.get(names[0])
    if kind is None:
        raise InvalidArgument(f"unknown encoder {names[0]}; known: {', '.join(ARCHITECTURES)}")
    return kind


def configure(source: Source, pooling: dict[str, Any] | None = None) -> EncoderConfig:
    """Map a ``config.json``; ``pooling`` overrides how a text's vector is made."""
    config, roberta = source.config, find(source) != "bert"
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InvalidArgument(f"position embedding '{config['position_embedding_type']}' is not known")
    if config.get("is_decoder"):
        raise InvalidArgument("this encoder is configured as a decoder (is_decoder)")
    classifies = "Classification" in config["architectures"][0]
    return EncoderConfig(
        vocab_size=int(require(config, "vocab_size")),
        hidden=int(require(config, "hidden_size")),
        layers=int(require(config, "num_hidden_layers")),
        heads=int(require(config, "num_attention_heads")),
        intermediate=int(require(config, "intermediate_size")),
        positions=int(require(config, "max_position_embeddings")),
        types=int(config.get("type_vocab_size", 2)),
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        activation=activation(config.get("hidden_act", "gelu")),
        first_position=int(config.get("pad_token_id", 1)) + 1 if roberta else 0,
        labels=_labels(config) if classifies else 0,
        names=_names(config) if classifies else (),
        exclusive=config.get("problem_type") != "multi_label_classification",
        **(pooling or {}),
    )


def rules(config: EncoderConfig, source: Source) -> Rules:
    """Where each parameter comes from; a bare model's tensors lack the prefix."""
    kind = find(source)
    prefix = "" if source.shape("embeddings.word_embeddings.weight") else _PREFIX[kind]
    at = f"{prefix}embeddings."
    made = {
        "words": (Part(f"{at}word_embeddings.weight", config.vocab_size),),
        "positions": (Part(f"{at}position_embeddings.weight", config.positions),),
        "types": (Part(f"{at}token_type_embeddings.weight", config.types),),
        **_norm("norm", f"{at}LayerNorm", config.hidden),
    }
    for index in range(config.layers):
        made |= _layer(f"layers.{index}.", f"{prefix}encoder.layer.{index}.", config)
    if config.labels:
        dense, classifier = _HEADS[kind]
        made |= _linear("dense", dense, config.hidden) | _linear("classifier", classifier, config.labels)
    return made


def read(folder: Path, dtype: Any) -> Encoder:
    """An encoder with its weights on the default device; errors name what is wrong with the checkpoint."""
    source = SafetensorsSource(folder)
    config = configure(source, read_pooling(folder))
    graph, tree = nnx.split(Encoder(config, abstract(dtype)))
    shapes = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(tree)}
    weights = apply(source, rules(config, source), shapes, lambda _, x: jnp.asarray(x), lambda *_: None)
    encoder: Encoder = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(tree), list(weights.values())))
    return encoder


FAMILY = Family(
    name="bert",
    architectures={"safetensors": tuple(ARCHITECTURES)},
    configure={"safetensors": configure},  # type: ignore[dict-item]
    rules=rules,  # type: ignore[arg-type]
)
"""As the converter and the kept checkpoints want it; no decoder is made of it."""


def _labels(config: dict[str, Any]) -> int:
    return int(config.get("num_labels") or len(config.get("id2label") or {}) or 2)


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    """The labels in order; numbered where the configuration does not name each."""
    named, count = config.get("id2label") or {}, _labels(config)
    return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(count))


def _layer(path: str, name: str, config: EncoderConfig) -> dict[str, tuple[Part, ...]]:
    sources = [f"{name}attention.self.{part}" for part in ("query", "key", "value")]
    made: dict[str, tuple[Part, ...]] = {
        f"{path}qkv.{leaf}": tuple(Part(f"{source}.{leaf}", config.hidden) for source in sources)
        for leaf in ("weight", "bias")
    }
    sizes = {"out": config.hidden, "up": config.intermediate, "down": config.hidden}
    for role, inner in _LAYER.items():
        make = _linear if role in sizes else _norm
        made |= make(f"{path}{role}", f"{name}{inner}", sizes.get(role, config.hidden))
    return made


def _linear(path: str, name: str, rows: int) -> dict[str, tuple[Part, ...]]:
    return {f"{path}.{leaf}": (Part(f"{name}.{leaf}", rows),) for leaf in ("weight", "bias")}


def _norm(path: str, name: str, size: int) -> dict[str, tuple[Part, ...]]:
    return {f"{path}.scale": (Part(f"{name}.weight", size),), f"{path}.bias": (Part(f"{name}.bias", size),)}

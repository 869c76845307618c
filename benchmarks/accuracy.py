"""What 8-bit weights and KV pages cost in accuracy, on a real model.

    python -m benchmarks.accuracy --model MODEL.gguf [--dtype float32] [--cases int8/own/int8 ...]

Perplexity is that of the opening of Thoreau's "Walden" (benchmarks/texts/walden.txt, public domain), in
pieces of 512 tokens. Agreement is the share of the float32 model's greedy tokens, over the prompts of
tests/data/reference, that are also this one's greedy choice after the same tokens. Both run through the
paged cache. A case is WEIGHTS/WAY/KV: with the way "native" activations are quantised too, as the products
of a GPU do; "own" is what this device does. The first line is float32 in everything, and the others are
compared with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, arguments
from llmos.drivers.jax import families
from llmos.drivers.jax.attention.plans import PrefillPlan
from llmos.drivers.jax.attention.xla import XlaAttention
from llmos.drivers.jax.decoder import forward, quant
from llmos.drivers.jax.loading import parameters
from llmos.drivers.jax.sharding.collectives import Columns
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights.convert import convert
from llmos.drivers.jax.weights.source import open_source
from llmos.drivers.sdk.messages import DType, Precision
from llmos.services.models import tokenizer

ROOT = Path(__file__).parent
TEXT = ROOT / "texts" / "walden.txt"
REFERENCE = ROOT.parent / "tests" / "data" / "reference" / "smollm2-135m-instruct.json"
LENGTH, ROWS, PAGE = 512, 4, 16
CASES = [
    f"{weights}/{kv}"
    for weights in ("same/own", "int8/own", "int8/native", "float8/own", "float8/native")
    for kv in ("bfloat16", "int8", "float8")
]


@dataclass(frozen=True)
class Pieces:
    """Token sequences [n, LENGTH], padded with 0, and which of their tokens count: as text, as answers."""

    tokens: np.ndarray
    text: np.ndarray
    answer: np.ndarray


def pieces(text: list[int], cases: list[dict[str, Any]]) -> Pieces:
    """The text in pieces, and each case's prompt with its answer, if it is not too long."""
    rows = [(text[at : at + LENGTH], 0) for at in range(0, len(text), LENGTH)]
    fitting = [case for case in cases if len(case["prompt"]) + len(case["output"]) <= LENGTH]
    rows += [(case["prompt"] + case["output"], len(case["prompt"])) for case in fitting]
    rows += [([0], 0)] * (-len(rows) % ROWS)
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    texts, answers = np.zeros((2, len(rows), LENGTH - 1), bool)
    for index, (row, prompt) in enumerate(rows):
        tokens[index, : len(row)] = row
        (answers if prompt else texts)[index, max(prompt - 1, 0) : len(row) - 1] = True
    return Pieces(tokens, texts, answers)


def score(model: Path, tokens: np.ndarray, dtype: DType, weights: Precision, kv: DType) -> Any:
    """Log-likelihood of each next token, and the likeliest one instead, both [n, LENGTH - 1]."""
    source = open_source(str(model))
    family = families.find(source)
    config = family.configure[source.format](source)
    here = OneDevice(jax.devices()[0])
    graph, tree, shapes = parameters.parameters(config, parameters.DTYPES[dtype], here, weights)
    place = lambda path, value: jax.device_put(value, shapes[path].sharding)  # noqa: E731
    found = convert(source, family, config, shapes, place, lambda *_: None)
    width, backend = LENGTH // PAGE, XlaAttention()
    shape = forward.Shape(graph, tree, backend, PAGE, ROWS * width + 1, Columns(config.vocab_size))
    caches = backend.allocate(config, shape.pages, PAGE, parameters.KV_DTYPES[kv])
    run = jax.jit(partial(_score, shape))
    parts = [
        run([found[path] for path in shapes], caches, tokens[at : at + ROWS])
        for at in range(0, len(tokens), ROWS)
    ]
    return tuple(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))


def _score(shape: forward.Shape, weights: Any, caches: Any, tokens: jax.Array) -> Any:
    place = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    tables = jnp.arange(shape.pages - 1, dtype=jnp.int32).reshape(ROWS, -1)
    pages = jnp.take_along_axis(tables, place // PAGE, axis=1)
    starts = jnp.zeros(ROWS, jnp.int32)
    plan = PrefillPlan(tables, starts, starts + LENGTH, pages, place % PAGE)
    logits = forward.run(shape, weights, caches, tokens, place, plan)[1][:, :-1]
    each = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(each, tokens[:, 1:, None], axis=-1)[..., 0], logits.argmax(axis=-1)


def main() -> None:
    parser = arguments("Accuracy of 8-bit weights and KV pages.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or safetensors folder")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for the tokenizer")
    parser.add_argument("--dtype", default="bfloat16", choices=list(parameters.DTYPES))
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="WEIGHTS/WAY/KV")
    options = parser.parse_args()
    encoded = tokenizer.load(options.model, options.cache).encode(TEXT.read_text())
    wanted = pieces(encoded, json.loads(REFERENCE.read_text())["cases"])
    report = Report("accuracy")
    base: Any = None
    print(
        "| weights | activations | KV | perplexity | against float32 | agreement |\n|---|---|---|---|---|---|"
    )
    cases: list[list[Any]] = [case.split("/") for case in ["float32/own/float32", *options.cases]]
    for weights, way, kv in cases:
        first = weights == "float32"
        kinds: tuple[Any, Any] = ("float32", "same") if first else (options.dtype, weights)
        dtype, kind = kinds
        jax.clear_caches()  # a layer traced for another way looks the same
        with mock.patch.object(quant, "choose", (lambda *_: "native") if way == "native" else quant.choose):
            likelihood, choice = score(options.model, wanted.tokens, dtype, kind, kv)
        perplexity = float(np.exp(-likelihood[wanted.text].mean()))
        base = base or (perplexity, choice)
        agreement = float((choice == base[1])[wanted.answer].mean())
        name, acts = (dtype if kind == "same" else kind), (weights if way == "native" else dtype)
        print(f"| {name} | {acts} | {kv} | {perplexity:.3f} | {perplexity / base[0] - 1:+.2%} "
              f"| {agreement:.1%} |", flush=True)  # fmt: skip
        report.figures[f"{name}/{acts}/{kv}"] = {"perplexity": perplexity, "agreement": agreement}
    counted = {"text_tokens": int(wanted.text.sum()), "answer_tokens": int(wanted.answer.sum())}
    report.environment = {"model": str(options.model), "dtype": options.dtype, **counted}
    report.write(options.json)


if __name__ == "__main__":
    main()

"""What LoRA adapters cost: one model with room for none and for several, in turns in one process.

    python -m benchmarks.lora --model MODEL [--dtype bfloat16] [--adapters 0 1 8 32] [--rank 16] \
        [--batch 256] [--prompt 512] [--json FILE]

Row i of a batch has adapter i modulo their number, so that a batch mixes all of them. ``--model`` may be
``random:CONFIG_JSON``; of an 8B shape each takes 16 GB and its own KV, so lower ``--batch`` or name fewer.
The adapter is one random file for all seven kinds of products, loaded under as many names: what is in it
does not matter to the time. ``idle`` is the model with the most room and no row that has an adapter. ``load``
is the time to load an adapter; ``first_load`` that of the first, which has the adapted programs compiled.

A prompt is one chunk unless ``--chunk-tokens`` says otherwise, since fewer chunk lengths are fewer programs;
the plain programs of all models are the same, and ``--cache`` (else a folder that is removed) keeps them. On
an H200: ``--model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 --page-tokens 64 --adapters 0 8
--batch 64 --prompt 128``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from benchmarks.engine import Session
from benchmarks.report import Report, arguments
from llmos.drivers.jax.adapters.adapters import targets
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Chunk, LoadAdapter, LoadRequest, Start

STEPS = 32
MODULES = {
    "attention.qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "attention.out": ("self_attn", ("o_proj",)),
    "mlp.gate_up": ("mlp", ("gate_proj", "up_proj")),
    "mlp.up": ("mlp", ("up_proj",)),
    "mlp.down": ("mlp", ("down_proj",)),
}


def write_adapter(folder: Path, config: DecoderConfig, rank: int) -> Path:
    """A random adapter of every product of a model, as PEFT saves it, in float16."""
    rng, tensors = np.random.default_rng(0), {}
    for path, target in targets(config).items():
        _, layer, product = path.split(".", 2)
        block, modules = MODULES[product]
        for module, size in zip(modules, target.parts, strict=True):
            at = f"base_model.model.model.layers.{layer}.{block}.{module}"
            for name, shape in (("A", (rank, target.inner)), ("B", (size, rank))):
                values = rng.standard_normal(shape, np.float32) * 0.01
                tensors[f"{at}.lora_{name}.weight"] = values.astype(np.float16)
    names = sorted({name.split(".")[-3] for name in tensors})
    config_json = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Contender:
    """A loaded model with as many adapters as it has room for; ``used`` of them are in a batch."""

    def __init__(self, options: argparse.Namespace, adapters: int) -> None:
        self.used, self.options = adapters, options
        driver = JaxDriver()
        total = options.prompt + STEPS * (options.repeats + 2) + 16
        self.total = -(-total // options.page_tokens) * options.page_tokens
        request = LoadRequest(
            model="bench", source=options.model, cache=options.cache, dtype=options.dtype,
            weights=options.weights, kv_dtype=options.dtype, slots=options.batch, max_context=self.total,
            pages=options.batch * self.total // options.page_tokens, page_tokens=options.page_tokens,
            chunk_tokens=options.chunk_tokens or options.prompt, adapters=adapters, adapter_rank=options.rank,
        )  # fmt: skip
        self.session = Session(driver, driver.load(request, lambda _: None))
        self.load_s = self.load_adapters(driver) if adapters else []
        behind = driver._engines["bench"][0].programs._behind
        assert behind is not None
        behind.join()  # what is compiled behind would be measured too
        while driver.idle():
            pass

    def load_adapters(self, driver: JaxDriver) -> list[float]:
        """Seconds that loading each of them took."""
        times: list[float] = []
        room = driver._engines["bench"][0].programs.spec.room
        with tempfile.TemporaryDirectory() as folder:
            source = str(write_adapter(Path(folder), room.config, self.options.rank))
            for number in range(self.used):
                begun = time.perf_counter()
                driver.load_adapter(LoadAdapter(model="bench", adapter=f"a{number}", source=source))()()
                times.append(time.perf_counter() - begun)
        return times

    def admit(self, slots: int, used: int) -> tuple[list[Start], list[Chunk]]:
        starts, chunks = self.session.admit(slots, self.options.prompt, self.total)
        names = [f"a{slot % used}" if used else "" for slot in range(slots)]
        pairs = zip(starts, names, strict=True)
        return [msgspec.structs.replace(start, adapter=name) for start, name in pairs], chunks

    def decode(self, used: int) -> list[float]:
        """Seconds of quanta of ``STEPS`` steps of a full batch."""
        slots = list(range(self.options.batch))
        starts, chunks = self.admit(len(slots), used)
        self.session.run(len(chunks), start=starts, chunks=chunks)
        self.session.run(STEPS, decode=slots)
        times = [self.session.run(STEPS, decode=slots)[1] for _ in range(self.options.repeats)]
        self.session.run(1, release=slots)
        return times

    def prefill(self, used: int) -> float:
        """Seconds of one prompt."""
        starts, chunks = self.admit(1, used)
        seconds = self.session.run(len(chunks), start=starts, chunks=chunks)[1]
        self.session.run(1, release=[0])
        return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rates by number of adapters, each the median over rounds in which all take their turn."""
    made = {str(count): Contender(options, count) for count in options.adapters}
    runs = [(name, each, each.used) for name, each in made.items()]
    most = max(made.values(), key=lambda each: each.used)
    runs += [("idle", most, 0)] if most.used else []
    decode: dict[str, list[float]] = {name: [] for name, *_ in runs}
    prefill: dict[str, list[float]] = {name: [] for name, *_ in runs}
    for turn in range(options.rounds + 1):
        for name, each, used in runs:
            times, seconds = each.decode(used), each.prefill(used)
            if turn:
                decode[name] += times
                prefill[name].append(seconds)
    rate = lambda times: options.batch * STEPS / statistics.median(times)  # noqa: E731
    figures = {f"decode_{name}_tokens_per_s": round(rate(times), 1) for name, times in decode.items()}
    for name, times in prefill.items():
        figures[f"prefill_{name}_tokens_per_s"] = round(options.prompt / statistics.median(times), 1)
    for name, each in made.items():
        if each.used:
            figures[f"first_load_{name}_s"] = round(each.load_s[0], 3)
            figures[f"load_{name}_s"] = round(statistics.median(each.load_s[1:] or each.load_s), 3)
    return figures


def main() -> None:
    """Measure and print, or write as JSON."""
    parser = arguments("What LoRA adapters cost.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", default="same", choices=["same", "int8", "float8"])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=0, help="0: those of the prompt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or folder
        figures = measure(options)
    base = {kind: figures.get(f"{kind}_0_tokens_per_s", 0.0) for kind in ("decode", "prefill")}
    ratios = {
        name.removesuffix("_tokens_per_s"): round(value / base[name.partition("_")[0]], 3)
        for name, value in figures.items()
        if name.endswith("_per_s") and base[name.partition("_")[0]]
    }
    fields = ("model", "dtype", "weights", "rank", "batch", "prompt")
    environment = {name: getattr(options, name) for name in fields}
    environment["device"] = JaxDriver().describe().devices[0].name
    Report("lora", figures, {}, ratios, environment).write(options.json)


if __name__ == "__main__":
    main()

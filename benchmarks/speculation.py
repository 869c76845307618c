"""One stream with speculation and without, on text that repeats and on text that does not; engine alone.

    python -m benchmarks.speculation --model MODEL.gguf [--draft SMALLER.gguf] [--dtype float32] [--json FILE]
    python -m benchmarks.speculation --model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 \
        --page-tokens 64 --chunk-tokens 2048 --max-context 8192

All variants are loaded into one process and take turns, so that the ratios hold on a noisy machine. "repeats"
is greedy after a prompt of log lines that repeat; a model with random weights soon goes in circles by itself.
"varied" is sampled at temperature 1 from a fixed seed; random weights then give noise, which no guess meets.
"always" verifies on every step, whatever it costs; "ngram" and "draft" leave that to the policy, as a server
does. ``tokens_per_step`` is what a step that verified gained, from 1 to one more than the guesses, and
``verified`` the share of such steps. With ``--same`` the tokens of all variants have to be equal (float32).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks import report
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Chunk, LoadedModel, LoadRequest, Quantum, Sampling, Start, Step
from llmos.services.models import tokenizer

LINE = "2026-11-22 10:15:{:02d} INFO worker {} finished job in 12 ms, queue is empty\n"
STORY = "It was late in the autumn when the old lighthouse keeper first noticed that"
WAYS: dict[str, Literal["off", "draft"]] = {"off": "off", "draft": "draft"}
TEXTS = {"repeats": Sampling(), "varied": Sampling(temperature=1.0, seed=7)}


def prompt_of(text: str, model: str, cache: str, vocab: int, length: int) -> list[int]:
    """Tokens to begin with; a model without a tokenizer gets numbers."""
    if model.startswith("random:"):
        period = 16 if text == "repeats" else length
        return [3 + (7919 * (i % period)) % (vocab - 3) for i in range(length)]
    lines = "".join(LINE.format(i % 4, i % 4) for i in range(12))
    known = tokenizer.load(Path(model), Path(cache or "/tmp/llmos-bench"))
    return known.encode(lines if text == "repeats" else STORY)


class Stream:
    """One loaded model and single streams run on it."""

    def __init__(self, driver: JaxDriver, loaded: LoadedModel) -> None:
        self.driver, self.loaded, self.quanta = driver, loaded, 0

    def run(self, steps: int, **fields: Any) -> list[Step]:
        """Execute one quantum with two steps pending, as the SDK does."""
        self.quanta += 1
        pending: list[Callable[[], Step]] = []
        done: list[Step] = []
        quantum = Quantum(id=self.quanta, model=self.loaded.model, steps=steps, **fields)
        for step in self.driver.execute(quantum):
            pending.append(step)
            if len(pending) == 2:
                done.append(pending.pop(0)())
        return done + [step() for step in pending]

    def generate(self, prompt: list[int], count: int, sampling: Sampling) -> tuple[list[int], float]:
        """The tokens after a prompt, and how many of them came in a second once it was prefilled."""
        limit, size = len(prompt) + count, self.loaded.chunk_tokens
        pages = list(range(-(-limit // self.loaded.page_tokens)))
        start = Start(slot=0, tokens=prompt, prompt=len(prompt), pages=pages, limit=limit, sampling=sampling)
        spans = [(at, min(size, len(prompt) - at)) for at in range(0, len(prompt), size)]
        chunks = [Chunk(step, 0, at, length) for step, (at, length) in enumerate(spans)]
        done = self.run(len(chunks), start=[start], chunks=chunks)
        begun = time.perf_counter()
        while sum(len(step.tokens) for step in done) < count:
            done += self.run(64, decode=[0])
        seconds = time.perf_counter() - begun
        self.run(0, release=[0])
        return [token for step in done for token in step.tokens], (count - 1) / seconds


def kinds(stream: Stream) -> dict[str, float]:
    """Tokens of a verifying step, and the share of those steps, since this was asked last."""
    speculation = stream.driver._engines[stream.loaded.model][0].speculation
    if speculation is None:
        return {}
    verified = sum(n for (_, guesses), n in speculation.steps.items() if guesses)
    rows = sum(n for (_, guesses), n in speculation.rows.items() if guesses)
    gained = sum(n for (_, guesses), n in speculation.gained.items() if guesses)
    total = sum(speculation.steps.values())
    for counter in (speculation.steps, speculation.rows, speculation.gained):
        counter.clear()
    return {
        "tokens_per_step": round(gained / max(rows, 1), 2),
        "verified": round(verified / max(total, 1), 2),
    }


def load(options: argparse.Namespace, driver: JaxDriver) -> dict[str, Stream]:
    """A stream for each variant."""
    variants = ["off", "ngram", "always"] + (["draft"] if options.draft else [])
    streams = {}
    for name in variants:
        request = LoadRequest(
            model=name,
            source=options.model,
            cache=options.cache,
            dtype=options.dtype,
            kv_dtype=options.dtype,
            page_tokens=options.page_tokens,
            pages=-(-options.max_context // options.page_tokens),
            chunk_tokens=options.chunk_tokens,
            slots=1,
            max_context=options.max_context,
            speculation=WAYS.get(name, "ngram"),
            speculation_tokens=options.guesses,
            draft=options.draft if name == "draft" else "",
        )
        streams[name] = Stream(driver, driver.load(request, lambda _: None))
        warm(streams[name], name == "always")
    return streams


def warm(stream: Stream, always: bool) -> None:
    """Compile what verifies, which a server does in the background; then leave the choice to the policy."""
    speculation = stream.driver._engines[stream.loaded.model][0].speculation
    if speculation is not None:
        speculation.policy.always = True
        for sampling in TEXTS.values():
            stream.generate([5] * 16, 16, sampling)
        speculation.policy.always = always


def measure(options: argparse.Namespace, streams: dict[str, Stream], text: str) -> dict[str, Any]:
    """All variants in turn, ``repeats`` times after one to warm up."""
    vocab = streams["off"].loaded.vocab_size
    prompt = prompt_of(text, options.model, options.cache, vocab, options.prompt)
    rates: dict[str, list[float]] = {name: [] for name in streams}
    tokens: dict[str, list[int]] = {}
    for turn in range(options.repeats + 1):
        for name, stream in streams.items():
            tokens[name], rate = stream.generate(prompt, options.tokens, TEXTS[text])
            if turn:
                rates[name].append(rate)
            else:
                kinds(stream)
    same = {name: found == tokens["off"] for name, found in tokens.items()}
    if options.same and not all(same.values()):
        raise SystemExit(f"{text}: the tokens differ: {same}")
    base = statistics.median(rates["off"])
    return {
        name: {
            "tokens_per_s": round(statistics.median(found), 1),
            "ratio": round(statistics.median(found) / base, 2),
            "same_tokens": same[name],
            **kinds(streams[name]),
        }
        for name, found in rates.items()
    }


def main() -> None:
    """Measure and print, or write as JSON."""
    parser = report.arguments("One stream with speculation and without.")
    parser.add_argument("--model", required=True, help="GGUF file, safetensors folder, or random:CONFIG_JSON")
    parser.add_argument("--draft", default="", help="a smaller model with the same vocabulary")
    parser.add_argument("--cache", default="", help="folder for converted weights and compiled programs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--guesses", type=int, default=0, help="0: as many as the driver likes")
    parser.add_argument("--prompt", type=int, default=256, help="tokens, of a model without a tokenizer")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "pallas"])
    parser.add_argument("--same", action="store_true", help="fail if tokens differ")
    options = parser.parse_args()
    driver = JaxDriver(attention=options.attention)
    streams = load(options, driver)
    figures = {text: measure(options, streams, text) for text in TEXTS}
    ratios = {
        f"{text} {name}": each["ratio"] for text, found in figures.items() for name, each in found.items()
    }
    environment = {"device": driver.describe().devices[0].name, "attention": streams["off"].loaded.attention}
    for name in streams:
        driver.unload(name)
    report.Report("speculation", figures, {}, ratios, environment).write(options.json)


if __name__ == "__main__":
    main()

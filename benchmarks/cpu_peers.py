"""The JAX driver on a CPU against transformers, llama.cpp and vLLM: same weights, same threads, one run.

    python -m benchmarks.cpu_peers --model MODEL.gguf [--peers transformers llama.cpp vllm] [--rounds 5]

Tokens per second of greedy decoding at several batch sizes, and of a prompt of ``--prompt`` tokens, without
any server. Peers are installed on first use into environments of their own under ``--folder``. All engines
are loaded at once and idle but one; in every round each of ours runs after each peer, and a ratio is the
median over the rounds of ours over the peer that ran just before. On a machine that others use, only the
ratios and the best of the rounds mean something. Ours are named DTYPE, or DTYPE/xla without native kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import environments
from benchmarks.report import Report

MODULES = {"transformers": "with_transformers", "llama.cpp": "with_llama_cpp", "vllm": "with_vllm"}
DTYPES = {
    "transformers": ["float32", "bfloat16"],
    "llama.cpp": ["float32", "bfloat16", "Q8_0"],
    "vllm": ["float32", "bfloat16"],
}
PREFILL = 0
"""The column of prompts; the others are batch sizes."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Engine:
    """A worker process; RuntimeError says why it is not available."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w")
        )
        self._answer()

    def ask(self, action: str, **fields: Any) -> float:
        """Seconds that the worker took."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": action, **fields}), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise RuntimeError(environments.last_words(self.log)) from error
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            why = "an illegal instruction" if status == -4 else environments.last_words(self.log)
            raise RuntimeError(f"it ended with status {status}: {why}")
        return dict(json.loads(line))


@dataclass
class Comparison:
    """What was measured: tokens per second by engine and column, round by round, and ratios by pair."""

    rates: dict[str, dict[int, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    ratios: dict[tuple[str, str], dict[int, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, column: int, peer: tuple[str, float], ours: list[tuple[str, float]]) -> None:
        """One peer's rate and those of ours that were measured right after it."""
        for name, rate in ([peer] if peer[0] else []) + ours:
            self.rates[name][column].append(rate)
        for name, rate in ours if peer[0] else []:
            self.ratios[name, peer[0]][column].append(rate / peer[1])

    def table(self, columns: list[int]) -> str:
        """A Markdown table of medians with the best in brackets, and one of ratios."""
        titles = [f"batch {c}" if c else "prompt" for c in columns]
        lines = ["| tok/s: median (best) | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, found in self.rates.items():
            cells = [
                f"{statistics.median(found[c]):.0f} ({max(found[c]):.0f})" if found[c] else ""
                for c in columns
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += [f"| {name} | not available: {why} |" for name, why in self.missing.items()]
        lines += ["", "| ratio | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
        for (mine, peer), found in self.ratios.items():
            cells = [f"{statistics.median(found[c]):.2f}" if found[c] else "" for c in columns]
            lines.append(f"| {mine} / {peer} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def report(self, columns: list[int]) -> Report:
        """The same as JSON."""
        name = lambda column: f"decode_{column}" if column else "prefill"  # noqa: E731
        medians = {
            e: {name(c): statistics.median(r[c]) for c in columns if r[c]} for e, r in self.rates.items()
        }
        best = {e: {name(c): max(r[c]) for c in columns if r[c]} for e, r in self.rates.items()}
        ratios = {
            f"{mine} / {peer}, {name(c)}": round(statistics.median(found[c]), 3)
            for (mine, peer), found in self.ratios.items()
            for c in columns
            if found[c]
        }
        ours = {e: r for e, r in medians.items() if e.startswith("ours ")}
        peers = {e: r for e, r in medians.items() if e not in ours}
        figures = {"ours": ours, "best": best, "not available": self.missing}
        return Report("cpu_peers", figures=figures, peers=peers, ratios=ratios)


def launch(options: argparse.Namespace, comparison: Comparison) -> tuple[list[Engine], list[Engine]]:
    """Start our engines, then the peers; which peer cannot be started is noted with the reason."""
    ours, peers = [], []
    for variant in options.ours:
        dtype, _, how = variant.partition("/")
        command = [sys.executable, "-m", "benchmarks.peers.engine", str(options.model), dtype]
        ours.append(
            _start(f"ours {variant}", command, options, {"LLMOS_NATIVE": "off" if how == "xla" else "on"})
        )
    for peer in options.peers:
        for dtype in DTYPES[peer]:
            if options.dtypes and dtype not in options.dtypes:
                continue
            name = f"{peer} {dtype}"
            try:
                python = environments.python_of(peer, options.folder, say)
                command = [
                    str(python),
                    "-m",
                    f"benchmarks.peers.{MODULES[peer]}",
                    _model(peer, dtype, options),
                    dtype,
                ]
                peers.append(_start(name, command, options, {}))
            except RuntimeError as error:
                comparison.missing[name] = str(error)
                say(f"{name} is not available: {error}")
    return ours, peers


def _model(peer: str, dtype: str, options: argparse.Namespace) -> str:
    if peer == "llama.cpp":
        return str(environments.gguf_as(options.model, dtype, options.folder, say))
    if peer == "vllm":
        return str(environments.safetensors_of(options.model, options.folder, say))
    return str(options.model)


def _start(name: str, command: list[str], options: argparse.Namespace, extra: dict[str, str]) -> Engine:
    say(f"starting {name}")
    threads = {key: str(options.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")}
    cache = {"LLMOS_CACHE": str(options.folder / "ours")}
    env = {**os.environ, **threads, **cache, **extra, "OMP_WAIT_POLICY": "passive"}
    command = [*command, str(max(options.batch, default=1)), str(options.total)]
    return Engine(name, command, env, options.folder / f"{name.replace(' ', '-').replace('/', '-')}.log")


def measure(
    column: int, engines: tuple[list[Engine], list[Engine]], options: argparse.Namespace, into: Comparison
) -> None:
    """All rounds of one column."""
    ours, peers = engines
    work = {"tokens": options.prompt} if column == PREFILL else {"steps": options.steps}
    tokens = options.prompt if column == PREFILL else column * options.steps
    action = "prefill" if column == PREFILL else "decode"
    for engine in [*ours, *peers]:
        if column == PREFILL:
            engine.ask("prefill", **work)
        else:
            engine.ask("start", batch=column, context=options.context)
            engine.ask("decode", steps=2)
    for number in range(options.rounds):
        say(f"{action} {column or options.prompt}: round {number + 1} of {options.rounds}")
        for peer in [*peers] if peers else [None]:
            theirs = (peer.name, tokens / peer.ask(action, **work)) if peer else ("", 0.0)
            into.add(column, theirs, [(engine.name, tokens / engine.ask(action, **work)) for engine in ours])


def main() -> None:
    """Measure and print; a table to standard error, the report to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--peers", nargs="*", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--dtypes", nargs="*", help="of the peers; default all that a peer has")
    parser.add_argument("--ours", nargs="+", default=["float32", "bfloat16"], help="DTYPE or DTYPE/xla")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "llmos-peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    each = max(len(options.peers) * 3, 1)
    options.total = max(options.prompt, options.context + options.steps * options.rounds * each) + 16
    comparison, columns = Comparison(), [*options.batch, PREFILL]
    engines = launch(options, comparison)
    try:
        for column in columns:
            measure(column, engines, options, comparison)
            say(f"so far\n{comparison.table(columns)}")
    finally:
        for engine in [*engines[0], *engines[1]]:
            engine.close()
    comparison.report(columns).write(options.json)


if __name__ == "__main__":
    main()

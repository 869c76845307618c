"""vLLM on the GPU that ``benchmarks.serving`` ran on: the same requests, without its server.

    python -m benchmarks.serving ... --json ours.json
    python -m benchmarks.gpu_peer --model benchmarks/shapes/llama-3.1-8b.json --compare ours.json

Run both in one session of one machine: each takes the whole device, so they run one after the other. vLLM
(to be installed beside it: ``pip install vllm``) is asked in its own process, token ids in and out, which
spares it HTTP and the tokenizer; weights are random, its prefix cache is off, and it picks the tokens of a
step itself. ``ratios`` are our rates over its, and its first token's time over ours.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments
from benchmarks.serving import CASES, compare, first_token

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
Generate = Callable[[int, int, int], float]
"""(requests, prompt tokens, new tokens) -> seconds."""


def start(model: Path, folder: Path, slots: int, context: int) -> Generate:
    """Start the engine with random weights of the shape ``model``."""
    from vllm import LLM, SamplingParams

    config = json.loads(model.read_text()) | {"model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    engine = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=context,
        max_num_seqs=slots,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    rng = np.random.default_rng(1)

    def generate(requests: int, prompt: int, count: int) -> float:
        ids = [rng.integers(0, config["vocab_size"], prompt).tolist() for _ in range(requests)]
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        made = sum(len(output.outputs[0].token_ids) for output in done)
        if made != requests * count:
            raise RuntimeError(f"{made} tokens instead of {requests * count}")
        return seconds

    return generate


def measure(generate: Generate, case: str) -> dict[str, float]:
    """The case of ``benchmarks.serving`` of that name."""
    if case == "ttft":
        return first_token(lambda: generate(1, 2048, 1))
    if case == "one":
        times = [generate(1, 32, 512) - generate(1, 32, 1) for _ in range(3)]
        return {"tokens_per_s": round(511 / statistics.median(times), 1)}
    requests, count = {"batch": (256, 256), "queue": (1024, 256), "classify": (512, 1)}[case]
    seconds = generate(requests, 512, count)
    return {
        "output_tokens_per_s": round(requests * count / seconds, 1),
        "requests_per_s": round(requests / seconds, 2),
    }


def main() -> None:
    parser = arguments("vLLM with the requests of benchmarks.serving.")
    parser.add_argument("--model", type=Path, required=True, help="a shape of benchmarks/shapes")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--compare", type=Path, help="our report")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    report, begun = Report("gpu_peer"), time.perf_counter()
    with TemporaryDirectory() as folder:
        generate = start(options.model, Path(folder), options.slots, options.max_context)
        report.peers["load"] = {"seconds": round(time.perf_counter() - begun, 1)}
        generate(256, 64, 16)
        for case in options.only:
            generate(8, 2048 if case == "ttft" else 512, 1)
            report.peers[case] = measure(generate, case)
            print(case, report.peers[case], flush=True)
    if options.compare:
        ours: dict[str, Any] = json.loads(options.compare.read_text())
        report.figures = ours["figures"]
        report.ratios = compare(report.figures, report.peers)
    report.write(options.json)


if __name__ == "__main__":
    main()

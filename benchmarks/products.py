"""What an 8-bit product costs to compile and to run, by who multiplies: a table within a time limit.

    python -m benchmarks.products --model benchmarks/shapes/llama-3.1-8b.json [--rows 256] [--budget 85]

Each line is a ``benchmarks.roofline`` in a process of its own that is killed when its time is up, so that
one that compiles for ever says so and costs the others nothing. Those that are sure to be quick come first.
What a killed one was doing is shown by the last lines of its log: the stacks of its threads, and what XLA's
autotuner said it was at.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.report import Report, arguments

LINES = [  # weights, way, product
    ("float8", "native", "lt-untimed"),
    ("float8", "native", "lt"),
    ("same", "", "tuned"),
    ("float8", "widened", "tuned"),
    ("float8", "native", "tuned"),
]
SHOWN = 40  # last lines of the log of one that was killed
LOGGED = "autotuner=1,autotuner_pass=1,triton=1,cublaslt=1,gemm_fusion_autotuner=1"
RUN = "import faulthandler, runpy, sys; faulthandler.dump_traceback_later(float(sys.argv.pop(1))); \
runpy.run_module('benchmarks.roofline', run_name='__main__', alter_sys=True)"


def measure(line: tuple[str, str, str], options: Any, seconds: float) -> dict[str, Any]:
    """The figures of one line by rows, or an empty dictionary if ``seconds`` were not enough."""
    weights, way, product = line
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        rows = [str(count) for count in options.rows]
        command = [sys.executable, "-c", RUN, str(max(1.0, seconds - 2.0)), "--model", str(options.model)]
        command += ["--rows", *rows, "--seconds", str(options.seconds), "--json", str(report)]
        command += ["--weights", weights, "--product", product, *(["--way", way] if way else [])]
        with log.open("wb") as sink:
            logging = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": LOGGED}
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, stderr=sink, stdout=sink, timeout=seconds, env=os.environ | logging)
        if report.exists():
            return dict(msgspec.json.decode(report.read_bytes())["figures"])
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]), file=sys.stderr)
        return {}


def main() -> None:
    parser = arguments("8-bit products by who multiplies.")
    parser.add_argument("--model", type=Path, required=True, help="config.json of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[256], help="tokens at a time")
    parser.add_argument("--seconds", type=float, default=1.0, help="of running, each")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds for all")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds for each but the last")
    options = parser.parse_args()
    report, end = Report("products"), time.monotonic() + options.budget
    print(f"{'weights':8} {'way':8} {'product':11} {'rows':>5} compile s  TFLOP/s  pass ms")
    for line in LINES:
        left = end - time.monotonic()
        figures = measure(line, options, left if line == LINES[-1] else min(options.limit, left))
        name = f"{line[0]:8} {line[1] or '-':8} {line[2]:11}"
        for rows, found in figures.items():
            values = f"{found['compile_s']:9.1f} {found['last_tflops']:8.0f} {found['pass_ms']:8.2f}"
            print(f"{name} {rows:>5} {values}", flush=True)
        if not figures:
            print(f"{name} did not end in time, or failed: see the log above", flush=True)
        report.figures[" ".join(line)] = figures
    report.write(options.json)


if __name__ == "__main__":
    main()

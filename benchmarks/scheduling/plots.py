"""The figures of ``docs/scheduling.md`` as SVG; the only place that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "llmos"  # the same figures give the same file
import matplotlib.pyplot as plt  # noqa: E402

POLICIES = ("LLM OS", "FCFS", "vLLM priority", "FastServe MLFQ")


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Write a file for each experiment that has a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in (("bands", _bands), ("overload", _overload), ("fairness", _fairness), ("pool", _pool)):
        if name in figures:
            figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
            plot(axes, figures[name])
            figure.savefig(folder / f"scheduling-{name}.svg", metadata={"Date": None})
            plt.close(figure)


def _bands(axes: Any, figures: dict[str, Any]) -> None:
    width = 0.2
    for at, policy in enumerate(POLICIES):
        bars = [figures[policy][band]["p99_ms"] for band in ("realtime", "interactive")]
        axes.bar([i + (at - 1.5) * width for i in range(2)], bars, width, label=policy)
    axes.set_xticks(range(2), ["realtime", "interactive"])
    axes.set_yscale("log")
    axes.set_ylabel("first token, p99, ms")
    axes.legend(fontsize=8)


def _overload(axes: Any, figures: dict[str, Any]) -> None:
    for policy in POLICIES:
        axes.plot(
            figures["loads"], [r["goodput_tokens_per_s"] for r in figures[policy]], marker="o", label=policy
        )
    axes.set_xlabel("load, times capacity")
    axes.set_ylabel("tokens/s in time")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _fairness(axes: Any, figures: dict[str, Any]) -> None:
    for policy, style in (("LLM OS", "-"), ("FCFS", "--")):
        rows = figures["two_weighted"][policy]["service"]
        for tenant in (1, 2):
            axes.plot(
                [r[0] for r in rows], [r[tenant] for r in rows], style,
                label=f"{policy}: weight {(1, 3)[tenant - 1]}",
            )  # fmt: skip
    axes.set_xlabel("seconds")
    axes.set_ylabel("service / weight")
    axes.legend(fontsize=8)


def _pool(axes: Any, figures: dict[str, Any]) -> None:
    width = 0.35
    for at, way in enumerate(("static", "shared")):
        bars = [figures[traffic][way]["tokens_per_s_to_the_end"] for traffic in figures]
        axes.bar([i + (at - 0.5) * width for i in range(len(bars))], bars, width, label=way)
    axes.set_xticks(range(len(figures)), list(figures))
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8)

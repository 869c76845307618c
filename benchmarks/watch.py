"""What NVIDIA's own counters say while something runs: how busy the device is, its clock and its power.

``busy`` is the share of the time in which a kernel ran; nvidia-smi averages it over a sixth of a second to a
second, in whole percents. It disturbs nothing, where a profiler makes the host dispatch later. Of several
devices (those of ``CUDA_VISIBLE_DEVICES``, or all) each has its figures under its number.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from types import TracebackType
from typing import Any

FIELDS = ("index", "utilization.gpu", "clocks.sm", "power.draw")
EVERY_MS = 100


class Watch:
    """Use it in a ``with`` statement; ``figures`` afterwards, nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        if program := shutil.which("nvidia-smi"):
            query = f"--query-gpu={','.join(FIELDS)}"
            command = [program, query, "--format=csv,noheader,nounits", f"-lms={EVERY_MS}"]
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                command.append(f"--id={visible}")
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            text, _ = self._process.communicate()
            self.figures = summary(text)


def summary(text: str) -> dict[str, Any]:
    """Of lines of ``FIELDS``: what ``figures`` says of each device, or of the only one."""
    lines: dict[str, list[list[float]]] = {}
    for row in (line.split(",") for line in text.splitlines()):
        if len(row) == len(FIELDS) and row[-1].strip():  # not cut short
            lines.setdefault(row[0].strip(), []).append([float(cell) for cell in row[1:]])
    devices = {number: figures(rows) for number, rows in lines.items()}
    return devices if len(devices) > 1 else next(iter(devices.values()), {})


def figures(rows: list[list[float]]) -> dict[str, float]:
    """The mean share that a device was busy, its median clock and power.

    The first and the last fifth of the rows, in which work begins and ends, are left out.
    """
    kept = rows[len(rows) // 5 : len(rows) - len(rows) // 5]
    busy, clock, power = zip(*kept, strict=True)
    return {
        "busy": round(statistics.mean(busy) / 100, 4),
        "clock_mhz": statistics.median(clock),
        "power_w": statistics.median(power),
        "samples": len(kept),
    }

"""What NVIDIA's own counters say while something runs: how busy the device is, its clock and its power.

``busy`` is the share of the time in which a kernel ran; nvidia-smi averages it over a sixth of a second to a
second, in whole percents. It disturbs nothing, where a profiler makes the host dispatch later.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from types import TracebackType

FIELDS = ("utilization.gpu", "clocks.sm", "power.draw")
EVERY_MS = 100


class Watch:
    """Use it in a ``with`` statement; ``figures`` afterwards, nothing where there is no nvidia-smi."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        if program := shutil.which("nvidia-smi"):
            query = f"--query-gpu={','.join(FIELDS)}"
            command = [program, query, "--format=csv,noheader,nounits", f"-lms={EVERY_MS}", "--id=0"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            text, _ = self._process.communicate()
            self.figures = summary(text)


def summary(text: str) -> dict[str, float]:
    """Of lines of ``FIELDS``: the mean share that it was busy, its median clock and power. The first and the
    last fifth, in which work begins and ends, are left out; a line that is cut short too."""
    rows = [line.split(",") for line in text.splitlines()]
    kept = [[float(cell) for cell in row] for row in rows if len(row) == len(FIELDS) and row[-1].strip()]
    kept = kept[len(kept) // 5 : len(kept) - len(kept) // 5]
    if not kept:
        return {}
    busy, clock, power = zip(*kept, strict=True)
    return {
        "busy": round(statistics.mean(busy) / 100, 4),
        "clock_mhz": statistics.median(clock),
        "power_w": statistics.median(power),
        "samples": len(kept),
    }

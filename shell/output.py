"""How things are printed: plain text that a person and a script can read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def is_terminal() -> bool:
    """Whether a person is looking."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """A line about what is going on; answers go to stdout, this does not."""
    print(line, file=sys.stderr, flush=True)


def mesh_words(mesh: dict[str, int]) -> str:
    """The axes that a model is spread over; empty on one device."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Columns as wide as they need to be; those named in ``right`` are aligned to the right."""
    lines = [list(head), *([_clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _clean(cell: object) -> str:
    """A cell without what would move a terminal's cursor: labels and names come from others."""
    return "".join(c if c.isprintable() else "?" for c in str(cell))


def seconds(value: float) -> str:
    """A time span as people write it; "-" for one that never began."""
    if value < 0:
        return "-"
    if value < 60:
        return f"{value:.1f}s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def count(value: int) -> str:
    """A large number in three digits: 134515008 is "135M"."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves one before the point: 1536 is "1.5KiB"."""
    power = min(len(UNITS) - 1, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.4g}{UNITS[power]}"

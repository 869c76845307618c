"""``python -m benchmarks.scheduling [EXPERIMENT ...] [--json FILE] [--images FOLDER]``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Report, arguments
from benchmarks.scheduling.experiments import EXPERIMENTS


def main() -> None:
    """Run the experiments named, or all; draw what can be drawn where a folder is given."""
    parser = arguments("Scheduling policies on the same traffic, in simulated time.")
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help="default: all")
    parser.add_argument("--images", type=Path, help="a folder for plots")
    options = parser.parse_args()
    names = options.experiments or list(EXPERIMENTS)
    report = Report("scheduling", {name: EXPERIMENTS[name]() for name in names})
    if options.images:
        from benchmarks.scheduling.plots import draw

        draw(report.figures, options.images)
    report.write(options.json)


if __name__ == "__main__":
    main()

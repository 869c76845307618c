"""What every benchmark writes with ``--json FILE``: name, figures, peers, ratios, environment."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

PACKAGES = ("llmos", "pyzmq", "msgspec", "jax", "jaxlib", "grpcio", "torch", "transformers", "vllm")


@dataclass
class Report:
    """One run of one program. Ratios are ours over the peer's, measured interleaved in this run."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path | None) -> None:
        """Print the report, and write it to ``path`` if there is one."""
        self.environment = environment() | self.environment
        text = msgspec.json.format(msgspec.json.encode(self), indent=2)
        print(text.decode())
        if path is not None:
            path.write_bytes(text + b"\n")


def environment() -> dict[str, Any]:
    """The machine and the versions that matter."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the option that all programs have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the report to this file as JSON")
    return parser

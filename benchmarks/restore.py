"""How fast converted weights come back from disk, against the disk itself.

    python -m benchmarks.restore [--shape benchmarks/shapes/llama-3.1-8b.json] [--gigabytes 16] [--folder DIR]
        [--dtype bfloat16] [--turns 3] [--json FILE]

A checkpoint of the shape, with as many layers as fit in so many gigabytes (0.5 on a CPU; else all), is
written by the driver's own code. Then, in turns: its files are read by several threads past the page cache
(through it, where the file system has no direct I/O), and restored to the device by the driver's own code.
The page cache is emptied of them before each. The ratio is the restore's rate over the reads', each the best
of its turns.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax

from benchmarks.play import say
from benchmarks.report import Report, arguments
from llmos.drivers.jax import families, platform
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.loading.parameters import DTYPES, parameters
from llmos.drivers.jax.sharding.placement import OneDevice
from llmos.drivers.jax.weights import checkpoint
from llmos.drivers.jax.weights.random import RandomSource, fill

READERS = 16
SPAN = 64 << 20
BLOCK = 8 << 20


def main() -> None:
    parser = arguments("Restoring converted weights against reading their files.")
    parser.add_argument("--shape", default="benchmarks/shapes/llama-3.1-8b.json", help="a config.json")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="default: 0.5 on a CPU, else all layers")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on which disk")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    platform.keep_heap()
    family, config, shapes = sized(options)
    size = bytes_of(shapes)
    folder = Path(tempfile.mkdtemp(prefix="llmos-restore", dir=options.folder))
    try:
        say(f"writing {size / 1e9:.2f} GB ({config.layers} layers) to {folder}")
        saving = timed(lambda: write(folder / "weights", family, config, shapes))
        figures = {"gigabytes": round(size / 1e9, 2), "save_s": round(saving, 1)}
        figures |= measure(folder / "weights", shapes, options.turns)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = Report("restore", figures, environment={"device": jax.devices()[0].device_kind})
    report.ratios = {"restore_over_read": round(figures["restore_gb_s"] / figures["read_gb_s"], 3)}
    report.write(options.json)


def sized(options: Any) -> tuple[str, DecoderConfig, dict[str, Any]]:
    """Family, configuration and parameters, with the layers that fit; if none does, with fewer tokens."""
    source = RandomSource(options.shape)
    family = families.find(source)
    config: DecoderConfig = family.configure[source.format](source)
    device = jax.devices()[0]
    wanted = options.gigabytes or (0.5 if device.platform == "cpu" else 0.0)

    def made(config: DecoderConfig) -> dict[str, Any]:
        return parameters(config, DTYPES[options.dtype], OneDevice(device))[2]

    config = replace(config, layers=1) if wanted else config
    while wanted and bytes_of(made(config)) > 1e9 * wanted and config.vocab_size > 1024:
        config = replace(config, vocab_size=config.vocab_size // 2)
    while wanted and bytes_of(made(replace(config, layers=config.layers + 1))) <= 1e9 * wanted:
        config = replace(config, layers=config.layers + 1)
    return family.name, config, made(config)


def bytes_of(shapes: dict[str, Any]) -> int:
    return sum(prod(x.shape) * x.dtype.itemsize for x in shapes.values())


def write(folder: Path, family: str, config: DecoderConfig, shapes: dict[str, Any]) -> None:
    checkpoint.save(folder, family, config, fill(shapes))


def measure(folder: Path, shapes: dict[str, Any], turns: int) -> dict[str, Any]:
    """Rates in GB/s, the best of each; ``direct`` says whether reads went past the page cache. What a
    restore takes of the processors is the figure that a busy machine does not spoil."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e9
    jax.block_until_ready(fill({name: shapes[name] for name in list(shapes)[:1]}))
    direct = all(opens_directly(path) for path in files)
    rates: dict[str, list[float]] = {"read": [], "restore": [], "cached": []}
    work: list[float] = []
    for turn in range(turns):
        forget(files)
        rates["read"].append(size / timed(lambda: read_all(files, direct)))
        forget(files)
        begun = time.process_time()
        rates["restore"].append(size / timed(lambda: restore(folder, shapes)))
        work.append((time.process_time() - begun) / size)
        rates["cached"].append(size / timed(lambda: restore(folder, shapes)))
        say(f"turn {turn}: " + ", ".join(f"{name} {rate[-1]:.2f} GB/s" for name, rate in rates.items()))
    best = {f"{name}_gb_s": round(max(rate), 3) for name, rate in rates.items()}
    return {**best, "restore_cpu_s_per_gb": round(min(work), 3), "direct": direct}


def restore(folder: Path, shapes: dict[str, Any]) -> None:
    """All of it on the device, and dropped again."""
    jax.block_until_ready(checkpoint.restore(folder, shapes))


def read_all(files: list[Path], direct: bool) -> None:
    spans = [(file, at) for file in files for at in range(0, file.stat().st_size, SPAN)]
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda span: read_span(span[0], span[1], direct), spans):
            pass


def read_span(file: Path, start: int, direct: bool) -> None:
    descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, BLOCK) as block:  # direct I/O wants aligned memory
            for at in range(start, min(start + SPAN, file.stat().st_size), BLOCK):
                os.preadv(descriptor, [block], at)
    finally:
        os.close(descriptor)


def opens_directly(file: Path) -> bool:
    with suppress(OSError):
        read_span(file, 0, direct=True)
        return True
    return False


def forget(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()

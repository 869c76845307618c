"""Process-wide settings that must be made before, or when, the first device is touched."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos.drivers.sdk.messages import Device
from llmos.ipc.errors import NoMemory

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30
PAGE_LOCKED = (
    "XLA may not page-lock so much: it is allowed XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB (64) in the environment "
    "of the driver"
)
LEAST_HOLE = 256  # bytes, what XLA's allocator rounds to
HOLES = 16  # of each size: results of a few steps, and what their programs are given
FEW_TOKENS = 16  # a product with no more rows waits for its weight: there Triton's kernels are the faster


def cpu_threads(available: int) -> int:
    """Threads for XLA's CPU pool: all of a small machine, all but one of a larger one.

    The other processes of the system mostly wait; on two cores giving one away halves the speed.
    """
    return available if available <= 4 else available - 1


def prepare_process() -> None:
    """Size XLA's CPU pool; it reads NPROC once, when the first CPU device is made."""
    os.environ.setdefault("NPROC", str(cpu_threads(len(os.sched_getaffinity(0)))))


def keep_heap() -> bool:
    """Stop glibc from giving large temporaries back to the system after every step.

    With the default thresholds each step maps, zeroes and unmaps its temporaries again. Returns whether
    the C library took the settings; other C libraries have no ``mallopt`` and need none.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def keep_holes(device: Any) -> list[jax.Array]:
    """Small arrays with room for others between them, to be held for as long as a GPU is used.

    XLA records a program's CUDA graph anew, kernel by kernel, when one of its buffers has moved. What a step
    gives back lives on while others run: without holes of its own it is cut from where their temporaries
    were, which then move with every step.
    """
    sizes = [LEAST_HOLE << power for power in range(10) for _ in range(2 * HOLES)]
    made = []
    for size in sizes:
        made.append(jax.device_put(np.zeros(size, np.uint8), device))
        made[-1].block_until_ready()
    return made[::2]


def trim_heap() -> None:
    """Give free memory of the heap back to the system, where the C library knows how to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; not where it does not say."""
    return not _abilities().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def multiplies_matrices() -> bool:
    """Whether it has instructions for products of whole matrices of bfloat16, which the native kernels do not
    use."""
    return not _abilities().isdisjoint({"amx_bf16", "bf16"})


@cache
def _abilities() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        word for line in lines if line.startswith(("flags", "Features")) for word in line.split()
    )


def set_option(name: str, value: Any) -> None:
    """Set an option of jax."""
    jax.config.update(name, value)  # type: ignore[no-untyped-call]


def keep_programs(folder: str) -> None:
    """Cache compiled programs in ``folder``, however small or quickly compiled."""
    set_option("jax_compilation_cache_dir", folder)
    set_option("jax_persistent_cache_min_compile_time_secs", 0.0)
    set_option("jax_persistent_cache_min_entry_size_bytes", -1)


def compiler_options(device: Any, tokens: int) -> dict[str, Any] | None:
    """XLA's options for a program that takes ``tokens`` through a model's products.

    On NVIDIA GPUs cuBLASLt multiplies many rows as fast as Triton or faster, and trying Triton's kernels is
    what the autotuner spends its time on: minutes where products are of 8 bits.
    """
    if device.platform not in ("gpu", "cuda") or tokens <= FEW_TOKENS:
        return None
    return {"xla_gpu_enable_triton_gemm": False}


def describe_device(device: Any) -> Device:
    """A jax device in the terms of the driver protocol."""
    kinds = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
    return Device(
        id=device.id,
        kind=kinds.get(device.platform, "other"),  # type: ignore[arg-type]
        name=device.device_kind,
        memory=device_memory(device),
    )


def device_memory(device: Any) -> int:
    """Bytes a device has in all; 0 where it cannot tell."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def free_memory(device: Any) -> int:
    """Bytes still free on a device; 0 where it cannot tell."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    stats = device.memory_stats() or {}
    return max(0, int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0)))


@contextmanager
def lacking(message: str) -> Iterator[None]:
    """NoMemory where XLA finds that memory is short."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoMemory(f"{message}: {str(error).splitlines()[0]}") from None

"""Process-wide settings."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from llmos.drivers.jax import platform


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 4), (8, 7), (64, 63)])
def test_a_large_machine_leaves_a_core_to_the_other_processes(cores: int, threads: int) -> None:
    assert platform.cpu_threads(cores) == threads


def test_glibc_takes_the_heap_settings() -> None:
    import ctypes
    import sys

    expected = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")
    assert platform.keep_heap() is expected


def test_holes_of_every_small_size_are_kept_apart() -> None:
    kept = platform.keep_holes(jax.devices()[0])
    sizes = Counter(array.nbytes for array in kept)
    assert sizes == {256 << power: platform.HOLES for power in range(10)}


def test_memory_of_the_cpu_is_known() -> None:
    device = jax.devices("cpu")[0]
    assert 0 < platform.free_memory(device) <= platform.device_memory(device)


@pytest.mark.parametrize(
    ("kind", "tokens", "triton"), [("gpu", 256, False), ("gpu", 1, True), ("cpu", 256, True)]
)
def test_products_of_many_rows_on_a_gpu_are_left_to_cublas(kind: str, tokens: int, triton: bool) -> None:
    options = platform.compiler_options(SimpleNamespace(platform=kind), tokens)
    assert (options is None) is triton

"""Process-wide settings."""

from __future__ import annotations

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


def test_memory_of_the_cpu_is_known() -> None:
    device = jax.devices("cpu")[0]
    assert 0 < platform.free_memory(device) <= platform.device_memory(device)

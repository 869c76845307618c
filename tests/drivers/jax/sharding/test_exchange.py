"""Which sums are left to a kernel of our own, and that all others go on without it."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llmos.drivers.jax.native import nvcc
from llmos.drivers.jax.sharding import exchange
from llmos.drivers.jax.sharding.collectives import total
from llmos.drivers.jax.sharding.mesh import Axes
from llmos.drivers.jax.sharding.placement import place
from llmos.ipc.errors import NotSupported

AXES = ("expert", "tensor")


def lowered(x: jax.Array, axes: tuple[str, ...] = AXES, peers: int = 4) -> str:
    """The program of a sum over ``axes`` of two and two devices, where the kernel may be used."""
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), AXES)
    add: Callable[[Any], Any] = lambda x: total(x, axes)  # noqa: E731
    spec = PartitionSpec()
    run = jax.shard_map(add, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with exchange.use(peers):
        return jax.jit(run).lower(x).as_text()


def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_small_sums_over_all_devices_are_the_kernels() -> None:
    text = lowered(zeros(1, 4096))
    assert nvcc.TARGET in text
    assert "peers = 4 : i32" in text
    assert "all_reduce" not in text


@pytest.mark.parametrize(
    "x",
    [
        zeros(128, 4096, dtype=jnp.float32),  # too much for four
        zeros(3, 5),  # no multiple of 8 bytes
        zeros(0, 8),
        zeros(4, 64, dtype=jnp.int32),
    ],
    ids=str,
)
def test_other_arrays_are_xlas(x: Any) -> None:
    text = lowered(x)
    assert nvcc.TARGET not in text
    assert "all_reduce" in text


def test_sums_over_some_of_the_devices_are_xlas() -> None:
    assert nvcc.TARGET not in lowered(zeros(1, 4096), axes=("tensor",))


def test_nothing_is_the_kernels_where_it_is_not_to_be_used() -> None:
    assert nvcc.TARGET not in lowered(zeros(1, 4096), peers=0)


def test_a_function_that_was_traced_without_the_kernel_is_traced_again() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    inner = jax.jit(lambda x: total(x, ("tensor",)))
    spec = PartitionSpec()
    run = jax.shard_map(lambda x: inner(x), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program, x = jax.jit(run), zeros(1, 8)
    found = []
    for peers in (0, 2, 0):
        with exchange.use(peers):
            found.append(nvcc.TARGET in program.lower(x).as_text())
    assert found == [False, True, False]


def test_devices_without_a_link_say_so_and_use_xla(tmp_path: Path) -> None:
    there = place(jax.devices()[:2], Axes(tensor=2))
    assert not exchange.enable(jax.devices()[:2], tmp_path)
    assert exchange.state(jax.devices()[:2]) == "sums of our own are for 2 to 8 GPUs"
    assert there.sums == "xla (sums of our own are for 2 to 8 GPUs)"
    assert place(jax.devices()[:1], Axes()).sums == ""


def test_the_trial_takes_right_sums_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()[:2]
    monkeypatch.setattr(exchange, "OPTIONS", {})
    monkeypatch.setattr(exchange, "total", lambda part: jax.lax.psum(part, "all"))
    exchange.check(devices, (1, 300))
    monkeypatch.setattr(exchange, "total", lambda part: part.at[0, -1].add(1))
    with pytest.raises(NotSupported, match="are wrong here"):
        exchange.check(devices, (1, 300))


def test_without_a_compiler_one_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(nvcc.SWITCH, raising=False)
    with pytest.raises(NotSupported, match="set CUDA_HOME"):
        nvcc.library(tmp_path, "9.0")


def test_a_switch_turns_the_kernel_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(nvcc.SWITCH, "off")
    with pytest.raises(NotSupported, match="turned off by LLMOS_EXCHANGE"):
        nvcc.library(tmp_path, "9.0")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_the_kernel_compiles_and_without_gpus_says_why_not(tmp_path: Path) -> None:
    library = nvcc.library(tmp_path / "native", "9.0")
    why, group = ctypes.create_string_buffer(300), (ctypes.c_int * 2)(0, 1)
    refused = library.llmos_exchange_open(group, 9, ctypes.c_double(1), why, ctypes.c_size_t(300))
    assert refused, why.value
    assert why.value == b"9 GPUs are not 2 to 8"

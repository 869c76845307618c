"""Small sums over the GPUs of one host by a kernel of our own; NCCL takes four times as long to start one.

``enable`` makes a group of GPUs ready, ``use`` says which programs may take it while they are traced, and
``suits`` which of their sums: those over all of the program's devices that are small. Wherever there is no
compiler or no link, or the kernel adds up wrongly, XLA's sums go on as before.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llmos.drivers.jax.native import nvcc
from llmos.ipc.errors import InvalidArgument, LLMOSError, NotSupported

LARGEST = 1 << 20
"""Bytes of an array up to which the kernel has room; what all others are sent may be twice that."""
PEERS = 8
TRIAL_S = 5.0
PATIENCE_S = 60.0
"""How long a kernel waits for other GPUs: while it is tried, and later, when giving up ends the driver."""
OPTIONS: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""XLA's, for programs that use the kernel: two of them must not overlap in a CUDA graph."""
_TYPES = (jnp.float32, jnp.bfloat16)
_SIZES = (1, 3, 64 << 7, (LARGEST >> 3) - 5)  # in 8 bytes: one block, several, all with four lines a thread

READY = "ready"

_peers: Any = jax.make_user_context(0)  # type: ignore[no-untyped-call]
_lock = threading.Lock()
_states: dict[tuple[int, ...], str] = {}
_libraries: dict[str, ctypes.CDLL] = {}


def enable(devices: Sequence[Any], cache: Path) -> bool:
    """Make the kernel ready for a group of devices, compiling it into ``cache`` if need be; whether it is."""
    group = _ordinals(devices)
    with _lock:
        if group not in _states:
            try:
                _open(devices, cache)
                _states[group] = READY
            except LLMOSError as error:
                _states[group] = error.message
    return ready(devices)


def ready(devices: Sequence[Any]) -> bool:
    """Whether a group was enabled, and works."""
    return state(devices) == READY


def state(devices: Sequence[Any]) -> str:
    """ "ready", why a group does not use the kernel, or nothing if nobody has asked."""
    return _states.get(_ordinals(devices), "")


def use(peers: int) -> AbstractContextManager[None]:
    """What is traced inside runs on ``peers`` devices that are ready; 0: it may not use the kernel."""
    return cast("AbstractContextManager[None]", _peers(peers))


def suits(part: jax.Array, axes: tuple[str, ...]) -> bool:
    """Whether a sum over ``axes`` is for the kernel."""
    peers = _peers.value
    if not peers or jax.lax.axis_size(axes) != peers or part.dtype not in _TYPES:
        return False
    size = part.size * part.dtype.itemsize
    return size % 8 == 0 and 0 < size <= LARGEST and size * (peers - 1) <= 2 * LARGEST


def total(part: jax.Array) -> jax.Array:
    """The sum of all devices' parts, added in float32 in the devices' order."""
    shape = jax.ShapeDtypeStruct(part.shape, part.dtype)  # type: ignore[no-untyped-call]
    result: jax.Array = jax.ffi.ffi_call(nvcc.TARGET, shape)(part, peers=np.int32(_peers.value))
    return result


def check(devices: Sequence[Any], sizes: Sequence[int] = _SIZES, times: int = 3) -> None:
    """NotSupported if sums of arrays of ``sizes`` times 8 bytes differ from NumPy's in any bit."""
    mesh, random = Mesh(np.asarray(devices), ("all",)), np.random.default_rng(0)
    cut = PartitionSpec("all")  # type: ignore[no-untyped-call]
    with use(len(devices)):
        for size in sizes:
            for dtype in _TYPES:
                shape = (len(devices), size * 8 // jnp.dtype(dtype).itemsize)
                parts = random.standard_normal(shape, np.float32).astype(dtype)
                each = jax.shard_map(total, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
                placed = jax.device_put(parts, jax.NamedSharding(mesh, cut))
                _same(jax.jit(each).lower(placed).compile(OPTIONS), placed, parts, times)


def _same(program: Any, placed: jax.Array, parts: np.ndarray, times: int) -> None:
    expected = np.zeros(parts.shape[1:], np.float32)
    for part in parts:
        expected += part.astype(np.float32)
    for result in [program(placed) for _ in range(times)]:
        for got in np.asarray(result):
            if not np.array_equal(got, expected.astype(parts.dtype)):
                wrong = int((got != expected.astype(parts.dtype)).sum())
                raise NotSupported(
                    f"sums over GPUs of our own are wrong here: {wrong} of {got.size} in {got.dtype}"
                )


def _open(devices: Sequence[Any], cache: Path) -> None:
    if not 2 <= len(devices) <= PEERS or {x.platform for x in devices} != {"gpu"}:
        raise NotSupported(f"sums of our own are for 2 to {PEERS} GPUs")
    if {x.process_index for x in devices} != {jax.process_index()}:
        raise NotSupported("sums of our own are for GPUs of one process")
    library = _library(cache, devices[0].compute_capability)
    numbers = _ordinals(devices)
    group, why = (ctypes.c_int * len(numbers))(*numbers), ctypes.create_string_buffer(300)
    count, room = len(numbers), ctypes.c_size_t(len(why))
    if library.llmos_exchange_open(group, count, ctypes.c_double(TRIAL_S), why, room):
        raise NotSupported(f"the GPUs cannot sum by themselves: {why.value.decode(errors='replace')}")
    try:
        check(devices)
    except jax.errors.JaxRuntimeError as error:
        raise InvalidArgument(f"sums over GPUs of our own failed: {str(error)[:200]}") from error
    library.llmos_exchange_trust(group, count, ctypes.c_double(PATIENCE_S))


def _library(cache: Path, capability: str) -> ctypes.CDLL:
    """The library of a kind of GPU, registered with jax; there is one in a process."""
    if capability not in _libraries:
        if _libraries:
            raise NotSupported("sums of our own are for GPUs of one kind")
        library = nvcc.library(cache, capability)
        capsule = jax.ffi.pycapsule(library.llmos_sum)  # type: ignore[no-untyped-call]
        jax.ffi.register_ffi_target(nvcc.TARGET, capsule, platform="CUDA")
        _libraries[capability] = library
    return _libraries[capability]


def _ordinals(devices: Sequence[Any]) -> tuple[int, ...]:
    """CUDA's numbers of devices."""
    return tuple(device.local_hardware_id for device in devices)

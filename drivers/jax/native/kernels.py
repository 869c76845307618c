"""The native kernels as jax functions, and whether they are to be used.

Tracing inside ``use(True)`` lets ``layers`` and ``sampling`` call the kernels. They know nothing of meshes,
so a program that is sharded must be traced outside.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos.drivers.jax import platform
from llmos.drivers.jax.execution.state import Choice
from llmos.drivers.jax.native import build
from llmos.ipc.errors import LLMOSError

MEMORY_BOUND = 64
"""Rows up to which a bfloat16 weight is the kernel's even where the processor multiplies whole matrices."""
SOME = 8
"""Rows from which a pass of our own is worth its call."""
_GATES: dict[str, int] = {"silu": 0, "gelu_tanh": 1}
_TYPES = (jnp.float32, jnp.bfloat16)
_WEIGHTS = (*_TYPES, jnp.int8)

_wanted: ContextVar[bool] = ContextVar("native_kernels", default=False)
_lock = threading.Lock()
_state = ""


def enable(cache: Path) -> bool:
    """Make the kernels ready, compiling them into ``cache`` if need be; whether they are."""
    from llmos.drivers.jax.native import trial

    global _state
    with _lock:
        if not _state:
            try:
                _register(build.library(cache))
                trial.run()
                _state = "ready"
            except LLMOSError as error:
                _state = error.message
    return _state == "ready"


def state() -> str:
    """ "ready", why there are no kernels, or nothing if nobody has asked for them yet."""
    return _state


@contextmanager
def use(wanted: bool) -> Iterator[None]:
    """Whether what is traced inside may call the kernels."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def suits(rows: jax.Array, weight: jax.Array) -> bool:
    """Whether a product of ``rows`` [n, in] is for the kernel: on a CPU, where it is wanted."""
    if not _wanted.get() or _state != "ready":
        return False
    if rows.dtype not in _TYPES or weight.dtype not in _WEIGHTS:
        return False
    return rows.shape[0] <= MEMORY_BOUND or weight.dtype != jnp.bfloat16 or not platform.multiplies_matrices()


def product(rows: jax.Array, weight: jax.Array, out: Any = None) -> jax.Array:
    """``rows`` [n, in] times ``weight`` [out, in] -> [n, out]; the weight is float32, bfloat16 or int8."""
    shape = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), out or rows.dtype)  # type: ignore[no-untyped-call]
    result: jax.Array = jax.ffi.ffi_call(build.target("product"), shape)(rows, weight)
    return result


def gates(rows: jax.Array, activation: str) -> bool:
    """Whether ``gate`` is for ``rows`` [n, 2 size]: on a CPU, where it is wanted."""
    ready = _wanted.get() and _state == "ready" and rows.dtype in _TYPES
    return ready and activation in _GATES and rows.shape[0] >= SOME


def gate(rows: jax.Array, activation: str) -> jax.Array:
    """The activated first half of ``rows`` [n, 2 size] times the second -> [n, size]."""
    shape = jax.ShapeDtypeStruct((rows.shape[0], rows.shape[1] // 2), rows.dtype)  # type: ignore[no-untyped-call]
    kind = np.int32(_GATES[activation])
    result: jax.Array = jax.ffi.ffi_call(build.target("gate"), shape)(rows, activation=kind)
    return result


def chooses(logits: jax.Array) -> bool:
    """Whether ``choose`` is for ``logits``: on a CPU, where it is wanted."""
    return _wanted.get() and _state == "ready" and logits.dtype == jnp.float32


def choose(logits: jax.Array, choice: Choice, position: jax.Array, cuts: bool) -> jax.Array:
    """As ``sampling.choose``, of float32 ``logits`` [B, vocab]; top-k and top-p count only if it ``cuts``."""
    shape = jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32)  # type: ignore[no-untyped-call]
    asked = (choice.temperature, choice.top_k, choice.top_p, choice.min_p, choice.seed, position)
    call = jax.ffi.ffi_call(build.target("choose"), shape)
    result: jax.Array = call(logits, *asked, cuts=np.int32(cuts))
    return result


def _register(library: ctypes.CDLL) -> None:
    for name in build.KERNELS:
        function = getattr(library, f"llmos_{name}")
        capsule = jax.ffi.pycapsule(function)  # type: ignore[no-untyped-call]
        jax.ffi.register_ffi_target(build.target(name), capsule, platform="cpu")

"""The kernel that sums over the GPUs of one host, compiled with CUDA's compiler where there is one."""

from __future__ import annotations

import ctypes
import os
import shutil
from importlib import util
from pathlib import Path

from llmos.drivers.jax.native import build
from llmos.ipc.errors import NotSupported

SOURCE = Path(__file__).with_name("exchange.cu")
SWITCH = "LLMOS_EXCHANGE"
"""The environment variable that turns the kernel off with "off"."""
TARGET = build.label("sum", build.Recipe(SOURCE, (), "", ()))
"""The kernel's name in compiled programs."""


def library(folder: Path, capability: str) -> ctypes.CDLL:
    """The compiled kernel for GPUs of a capability ("9.0"); errors as in ``build.load``."""
    return build.load(build.Recipe(SOURCE, (), find(), flags(capability)), folder)


def flags(capability: str) -> tuple[str, ...]:
    """What the compiler is told."""
    arch = f"-arch=sm_{capability.replace('.', '')}"
    return ("-std=c++17", "-O3", arch, "-Xcompiler=-fPIC", "-shared")


def find() -> str:
    """CUDA's compiler: of $CUDA_HOME, the PATH, the usual place, or JAX's own packages."""
    if os.environ.get(SWITCH) == "off":
        raise NotSupported(f"sums of our own are turned off by {SWITCH}")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *_packaged()]
    for name in ("nvcc", *(f"{home}/bin/nvcc" for home in homes if home)):
        if found := shutil.which(name):
            return found
    raise NotSupported("no nvcc for sums over GPUs of our own: install CUDA's compiler, or set CUDA_HOME")


def _packaged() -> list[str]:
    """Where pip puts CUDA."""
    spec = util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [str(Path(place) / "cu13") for place in places or ()]

"""Compiling kernels, once per source, compiler, flags, processor and version of jaxlib."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.errors import IOFailure, NotSupported

SWITCH = "LLMOS_NATIVE"
"""The environment variable that turns the kernels off with "off"."""
SOURCE = Path(__file__).with_name("kernels.cc")
_HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
KERNELS = ("product", "attention", "prompts", "gate", "choose")
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared")
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300.0


@dataclass(frozen=True)
class Recipe:
    """How a library is made: of a source and its headers, by a compiler with flags."""

    source: Path
    headers: tuple[Path, ...]
    compiler: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called in messages and files."""
        return self.source.stem

    def text(self) -> bytes:
        """All that is compiled."""
        return b"".join(path.read_bytes() for path in (self.source, *self.headers))


def library(folder: Path) -> ctypes.CDLL:
    """The compiled kernels for the CPU; see ``load`` and ``find_compiler`` for the errors."""
    return load(Recipe(SOURCE, _HEADERS, find_compiler(), FLAGS), folder)


def load(recipe: Recipe, folder: Path) -> ctypes.CDLL:
    """A library, from ``folder`` if it is there.

    NotSupported says what is missing; IOFailure that the compiler failed; AccessDenied that others could
    have written to the folder.
    """
    made = paths.private_dir(folder) / f"{recipe.name}-{_key(recipe)}.so"
    if not made.exists():
        _compile(recipe, made)
    info = made.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise NotSupported(f"{made} is not a file that only you may write; remove it")
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise IOFailure(f"the native {recipe.name} cannot be loaded: {error}; remove {made}") from error


@cache
def target(name: str) -> str:
    """The name of a kernel in compiled programs; it changes with the source, so that old ones miss it."""
    return label(name, Recipe(SOURCE, _HEADERS, "", FLAGS))


def label(name: str, recipe: Recipe) -> str:
    """As ``target``, of a kernel of any library."""
    return f"llmos_{name}_{hashlib.sha256(recipe.text()).hexdigest()[:12]}"


def find_compiler() -> str:
    """The system's C++ compiler, or the one that $CXX names; NotSupported if there is none to be used."""
    if os.environ.get(SWITCH) == "off":
        raise NotSupported(f"the native kernels are turned off by {SWITCH}")
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NotSupported("no C++ compiler for the native kernels: install g++ or clang++, or set CXX")


def _key(recipe: Recipe) -> str:
    version = subprocess.run([recipe.compiler, "--version"], capture_output=True, check=False).stdout
    facts = (
        recipe.text(),
        version,
        " ".join(recipe.flags).encode(),
        _processor(),
        metadata.version("jaxlib").encode(),
    )
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(hashlib.sha256(fact).digest())
    return digest.hexdigest()[:20]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname()).encode()
    telling = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(telling)).encode()


def headers() -> str:
    """The folder of XLA's headers; ``jax.ffi.include_dir`` without jax."""
    found = util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        raise NotSupported("no jaxlib whose headers the native kernels could be compiled with")
    return str(Path(found.submodule_search_locations[0]) / "include")


def _compile(recipe: Recipe, made: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=made.parent)
    os.close(handle)
    command = [recipe.compiler, *recipe.flags, "-isystem", headers(), str(recipe.source), "-o", temporary]
    what = f"{recipe.compiler} cannot compile the native {recipe.name}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            raise IOFailure(f"{what}: {errors[0][:200]}")
        Path(temporary).chmod(0o700)
        Path(temporary).replace(made)
    except subprocess.TimeoutExpired as error:
        raise IOFailure(f"{what} in {_SECONDS:g} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)

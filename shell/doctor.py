"""``llmos doctor``: whether everything is as it should be, and what to do if not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmos.drivers.sdk.messages import DriverInfo
from llmos.ipc import paths
from llmos.ipc.errors import InvalidArgument, LLMOSError, NotSupported
from llmos.shell.output import mesh_words

if TYPE_CHECKING:
    from llmos.ipc.client import Client
    from llmos.services.models.messages import ModelLine

PACKAGES = ("msgpack", "msgspec", "zmq", "biscuit_auth", "cryptography", "tokenizers", "jinja2", "starlette",
            "uvicorn", "rich", "gguf")  # fmt: skip
DEVICE_PACKAGES = ("jax", "flax", "orbax.checkpoint", "safetensors")
PROBE_SECONDS = 120.0
ANSWER_SECONDS = 5.0
PROBE = "import jax; print('\\n'.join(f'{d.platform} {d.device_kind}' for d in jax.devices()))"

Level = Literal["ok", "note", "broken"]


class Finding(NamedTuple):
    """What one check found; ``advice`` says what to do."""

    level: Level
    what: str
    advice: str = ""


Check = Callable[[], Iterator[Finding]]


def doctor(options: argparse.Namespace) -> int:
    """Run every check; the exit status is 1 if one found something broken."""
    from llmos.services.supervisor import lock

    running = lock.holder(paths.run_dir()) is not None
    checks: list[Check] = [python, packages, folders, socket_paths, native_kernels, model_files]
    checks += [system] if running else [nothing_up, devices]
    broken = 0
    for check in checks:
        for finding in check():
            broken += finding.level == "broken"
            print(f"{finding.level:<6}  {finding.what}")
            if finding.advice:
                print(f"        -> {finding.advice}")
    print(f"{broken} problem{'s' if broken != 1 else ''} found" if broken else "all is well")
    return 1 if broken else 0


def python() -> Iterator[Finding]:
    """The interpreter and the platform."""
    release = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", f"Python {release}")
    if not hasattr(os, "pidfd_open"):
        yield Finding("broken", "no pidfd_open on this system", "use Linux 5.4 or later")


def packages() -> Iterator[Finding]:
    """What must be importable; looked for, not imported."""
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        yield Finding("broken", f"packages are missing: {', '.join(missing)}", "pip install llmos, once more")
    else:
        yield Finding("ok", f"{len(PACKAGES)} packages of the services")
    missing = [name for name in DEVICE_PACKAGES if not _installed(name)]
    if missing:
        advice = "pip install 'llmos[cpu]', or [cuda], or [tpu]"
        yield Finding("broken", f"the JAX driver lacks packages: {', '.join(missing)}", advice)
    else:
        yield Finding("ok", f"packages of the JAX driver: jax {metadata.version('jax')}")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def folders() -> Iterator[Finding]:
    """The three folders: whose they are, and who else may enter."""
    for what, path in (("run", paths.run_dir()), ("state", paths.state_dir()), ("cache", paths.cache_dir())):
        forbidden = 0o022 if what == "cache" else 0o077
        yield _folder(what, path, forbidden)


def _folder(what: str, path: Path, forbidden: int) -> Finding:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return Finding("ok", f"{what} folder {path} is made when it is needed")
    except OSError as error:
        return Finding(
            "broken", f"{what} folder {path}: {error.strerror}", "choose another one by LLMOS_" + what.upper()
        )
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        return Finding(
            "broken",
            f"{what} folder {path} is not a folder of yours",
            f"remove it, or set LLMOS_{what.upper()}",
        )
    if info.st_mode & forbidden:
        mode = stat.S_IMODE(info.st_mode)
        return Finding(
            "broken", f"{what} folder {path} is open to others (mode {mode:04o})", f"chmod 700 {path}"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding("broken", f"{what} folder {path} cannot be written", f"chmod 700 {path}")
    return Finding("ok", f"{what} folder {path}")


def socket_paths() -> Iterator[Finding]:
    """A socket's path has a bound in the operating system."""
    try:
        paths.socket_address("control")
    except InvalidArgument as error:
        yield Finding("broken", error.message, "set LLMOS_RUN to a shorter path")
    else:
        yield Finding("ok", "socket paths are short enough")


def native_kernels() -> Iterator[Finding]:
    """Whether models on a CPU run on kernels made for it."""
    from llmos.drivers.jax.native import build

    try:
        compiler = build.find_compiler()
    except NotSupported as missing:
        yield Finding("note", f"models on a CPU run on XLA's own kernels: {missing.message}")
        return
    if any((paths.cache_dir() / "native").glob("kernels-*.so")):
        yield Finding("ok", f"native CPU kernels, compiled by {compiler}")
    else:
        yield Finding("ok", f"native CPU kernels are compiled by {compiler} when a model is first loaded")


def model_files() -> Iterator[Finding]:
    """Whether the default model is there."""
    from llmos.services.manifest import DEFAULT_MODEL
    from llmos.services.models import store

    path = store.find(DEFAULT_MODEL)
    if path is None:
        yield Finding(
            "note",
            f"{DEFAULT_MODEL} is not there yet",
            "llmos up fetches it; or: llmos pull " + DEFAULT_MODEL,
        )
    else:
        yield Finding("ok", f"{DEFAULT_MODEL} at {path}")


def nothing_up() -> Iterator[Finding]:
    yield Finding("note", f"no system is up in {paths.run_dir()}", "llmos up --detach")


def devices() -> Iterator[Finding]:
    """Which devices the JAX driver would get; asked in a process of its own, which takes hold of them."""
    if not _installed("jax"):
        return
    command = [sys.executable, "-P", "-c", PROBE]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("broken", f"jax found no device in {PROBE_SECONDS:g} s", "try JAX_PLATFORMS=cpu")
        return
    if probe.returncode:
        last = (probe.stderr.strip() or "no message").splitlines()[-1]
        yield Finding(
            "broken", f"jax finds no device: {last}", "try JAX_PLATFORMS=cpu, or check the device's driver"
        )
        return
    for line in probe.stdout.split("\n"):
        if line.strip():
            yield Finding("ok", f"device {line.strip()}")


def system() -> Iterator[Finding]:
    """The running system: its processes, the kernel, the models and their attention."""
    from llmos.services.supervisor import status

    current = status.read(paths.run_dir())
    for process in current.processes if current else ():
        if process.state == "failed":
            log = paths.state_dir() / "logs" / f"{process.name}.log"
            yield Finding("broken", f"{process.name} was given up: {process.exit}", f"see {log}")
        elif process.state != "ready":
            yield Finding("note", f"{process.name} is {process.state}")
    if current is not None and all(process.state == "ready" for process in current.processes):
        yield Finding("ok", f"{len(current.processes)} processes are ready")
    yield from _answers()


def _answers() -> Iterator[Finding]:
    """What the kernel, the models and the drivers say."""
    from llmos.shell import catalogue, session

    try:
        with session.connect(ANSWER_SECONDS) as client:
            yield Finding("ok", f"the kernel answers, connection {client.connection}")
            lines = catalogue.list_models(client)
            yield from (_model(line) for line in lines)
            for driver in sorted({line.driver for line in lines}):
                yield from _driver(client, driver)
    except LLMOSError as error:
        yield Finding("broken", str(error), "llmos ps shows who is missing; llmos down, then llmos up")


def _model(line: ModelLine) -> Finding:
    if line.state == "failed":
        return Finding("broken", f"model {line.name}: {line.error}", f"see the log of driver.{line.driver}")
    if line.state == "missing":
        return Finding("broken", f"model {line.name} is missing", f"llmos pull {line.name}")
    if line.state != "ready":
        return Finding("note", f"model {line.name} is {line.state} on {line.driver}")
    attention = f", attention by {line.attention}" if line.attention else ""
    mesh = f", over a mesh of {words}" if (words := mesh_words(line.mesh)) else ""
    sums = f", small sums by {line.sums}" if line.sums else ""
    return Finding("ok", f"model {line.name} is ready on {line.driver}{attention}{mesh}{sums}")


def _driver(client: Client, name: str) -> Iterator[Finding]:
    """The devices that a running driver has, and what it can hold."""
    info = client.call(f"driver.{name}.describe", None, DriverInfo, timeout=ANSWER_SECONDS)
    yield Finding("ok", f"driver {name}: {info.driver} {info.version}, {', '.join(info.dtypes)}")
    for device in info.devices:
        memory = f", {device.memory / 2**30:.0f} GiB" if device.memory else ""
        yield Finding("ok", f"device {device.id}: {device.kind} {device.name}{memory}")

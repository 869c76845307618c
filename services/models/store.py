"""Where models lie on disk, and how one gets there: all of it, or nothing.

``models/NAME/`` in the cache folder holds ``model.gguf`` or ``weights/`` (safetensors, config, tokenizer) and
``model.json``. A model is fetched into ``.NAME.partial`` and renamed when it is complete and verified, so
what has its name is whole; a lock keeps two pulls of one model from working at once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from llmos.ipc import paths
from llmos.ipc.errors import IOFailure
from llmos.services.models import catalog, fetch
from llmos.services.models.fetch import PullProgress

__all__ = ["PullProgress", "StoredModel", "find", "pull", "stored"]


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model that was pulled; ``created`` in seconds since the Unix epoch."""

    name: str
    reference: str
    created: int
    bytes: int


def folder(name: str) -> Path:
    """Where a model of this name lies, or would."""
    return paths.cache_dir() / "models" / name


def find(name: str) -> Path | None:
    """The GGUF file or the folder of weights of a pulled model; None if it is not there."""
    for part in ("model.gguf", "weights"):
        path = folder(name) / part
        if path.exists():
            return path
    return None


def stored() -> list[StoredModel]:
    """Every model that was pulled, by name."""
    lines = []
    for path in sorted((paths.cache_dir() / "models").glob("*/model.json")):
        try:
            lines.append(msgspec.json.decode(path.read_bytes(), type=StoredModel))
        except (OSError, msgspec.DecodeError):
            continue
    return lines


def pull(
    reference: str,
    progress: Callable[[PullProgress], None] = lambda _: None,
    *,
    name: str = "",
    again: bool = False,
) -> Path:
    """Get a model and return where it lies; at once if it is there already and ``again`` is not asked for.

    ``progress`` is called a few times a second. Raises NotFound for an unknown name, InvalidArgument for
    what is no model, IOFailure where it cannot be fetched, is damaged, or the disk is full.
    """
    name, origin = catalog.resolve(reference, name)
    present = find(name)
    if present is not None and not again:
        return present
    target = folder(name)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(target.parent / f".{name}.lock", progress):
            present = find(name)
            if present is None or again:
                _fetch(reference, name, origin, progress)
    except OSError as error:
        raise IOFailure(f"cannot keep {name} under {target.parent}: {error.strerror or error}") from None
    path = find(name)
    if path is None:
        raise IOFailure(f"{target} vanished while it was pulled; pull it again")
    return path


def _fetch(
    reference: str, name: str, origin: catalog.Origin, progress: Callable[[PullProgress], None]
) -> None:
    target = folder(name)
    partial = target.with_name(f".{name}.partial")
    # Under the lock, whatever is there was left by a pull that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        fetch.fetch(origin, partial, progress)
        fetch.verify(partial)
        line = StoredModel(name=name, reference=reference, created=int(time.time()), bytes=_size(partial))
        paths.write_private(partial / "model.json", msgspec.json.encode(line))
        old = target.with_name(f".{name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: Callable[[PullProgress], None]) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(PullProgress("wait", 0, 0))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

"""Converted weights kept with Orbax, so that the next start restores instead of converting.

A kept checkpoint is a folder with ``manifest.json`` beside Orbax's own files. It is written under another
name and renamed when complete, so that a save that was killed is never restored; the manifest holds size
and CRC-32 of every file, so that a damaged one is recognised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from llmos.drivers.jax.config import DecoderConfig
from llmos.drivers.jax.modules import struct
from llmos.drivers.jax.weights.source import files_of
from llmos.ipc.errors import InvalidArgument

FORMAT = 1
_MANIFEST = "manifest.json"
_TREE = "tree"
_MAX_MANIFEST = 16 << 20
_READ_BYTES = 8 << 20
_CHECK_THREADS = 4
_log = logging.getLogger(__name__)


def key_of(source: str, dtype: str) -> str:
    """Name of the folder for these files, as they are now, converted to ``dtype`` by this format."""
    identity = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(source)]
    text = json.dumps([FORMAT, os.path.abspath(source), identity, dtype])
    return f"{dtype}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def is_checkpoint(folder: str) -> bool:
    """Whether ``folder`` is one of ours."""
    return os.path.isfile(os.path.join(folder, _MANIFEST))


def save(folder: Path, family: str, config: Any, weights: dict[str, jax.Array]) -> None:
    """Write ``weights`` (by path) to ``folder`` all at once or not at all; replaces what was there."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    ocp = _orbax()
    with ocp.Checkpointer(_handler(ocp)) as checkpointer:
        checkpointer.save(partial / _TREE, args=ocp.args.PyTreeSave(weights))
    manifest = {
        "format": FORMAT,
        "family": family,
        "config": asdict(config),
        "weights": {path: [list(x.shape), str(x.dtype)] for path, x in weights.items()},
        "files": {str(f.relative_to(partial)): [f.stat().st_size, _crc(f)] for f in _files(partial / _TREE)},
    }
    (partial / _MANIFEST).write_text(json.dumps(manifest))
    _flush([*_files(partial), partial])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush([folder.parent])


def read_manifest(folder: Path, make: Callable[..., Any] = DecoderConfig) -> tuple[str, Any, dict[str, Any]]:
    """Family, configuration and parameter shapes of a kept checkpoint; InvalidArgument if it is damaged."""
    try:
        if (folder / _MANIFEST).stat().st_size > _MAX_MANIFEST:
            raise ValueError("manifest too large")
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        config: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in manifest["config"].items()
        }
        shapes = {
            path: struct(tuple(shape), jax.numpy.dtype(dtype))
            for path, (shape, dtype) in manifest["weights"].items()
        }
        return str(manifest["family"]), make(**config), shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise InvalidArgument(f"the checkpoint {folder} is damaged: {cause}") from cause


def restore(folder: Path, shapes: dict[str, Any]) -> dict[str, jax.Array]:
    """Weights by path, each straight to the sharding of its ``shapes`` entry.

    Raises InvalidArgument when a file is missing, cut off or altered.
    """
    damage = _damage(folder)
    if damage:
        raise InvalidArgument(f"the checkpoint {folder} is damaged: {damage}")
    ocp = _orbax()
    arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
    with ocp.Checkpointer(_handler(ocp)) as checkpointer:
        request = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
        return dict(checkpointer.restore(folder / _TREE, args=request))


def discard(folder: Path, why: str) -> None:
    """Drop a damaged checkpoint, saying so."""
    _log.warning("dropping converted weights in %s: %s", folder, why)
    shutil.rmtree(folder, ignore_errors=True)


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; checked first, for Orbax reports damage by bare exceptions."""
    files = json.loads((folder / _MANIFEST).read_bytes())["files"]
    for name, (size, _) in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is missing or cut off"
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        sums = pool.map(lambda name: _crc(folder / name), files)
        altered = [name for (name, (_, crc)), found in zip(files.items(), sums) if crc != found]
    return f"{altered[0]} was altered" if altered else ""


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _orbax() -> Any:
    """Orbax takes a second to import, and is only needed when there is something to save or restore."""
    import orbax.checkpoint

    return orbax.checkpoint


def _handler(ocp: Any) -> Any:
    """Uncompressed zarr3 in OCDBT: float weights do not compress, and this restored four times faster."""
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)

"""Converted weights kept with Orbax, so that the next start restores instead of converting.

A kept checkpoint is a folder with ``manifest.json`` beside Orbax's own files. It is written under another
name and renamed when complete, so that a save that was killed is never restored; the manifest holds the size
of every file and the CRC-32 of each of its pieces, so that a damaged one is recognised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.jax.decoder.modules import struct
from llmos.drivers.jax.weights.source import files_of
from llmos.ipc.errors import InvalidArgument

FORMAT = 2
_MANIFEST = "manifest.json"
_TREE = "tree"
_MAX_MANIFEST = 16 << 20
_PIECE_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_CHECK_THREADS = 8
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
    files = _files(partial / _TREE)
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        sums = _sums(files, pool)
    manifest = {
        "format": FORMAT,
        "family": family,
        "config": asdict(config),
        "weights": {path: [list(x.shape), str(x.dtype)] for path, x in weights.items()},
        "files": {str(f.relative_to(partial)): [f.stat().st_size, sums[f]] for f in files},
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
        raise _damaged(folder, str(cause)) from cause


def restore(folder: Path, shapes: dict[str, Any]) -> dict[str, jax.Array]:
    """Weights by path, each straight to the sharding of its ``shapes`` entry.

    The sums are checked meanwhile, so that the files are read from the disk once. Raises InvalidArgument
    when a file is missing, cut off or altered.
    """
    files = json.loads((folder / _MANIFEST).read_bytes())["files"]
    for name, (size, _) in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise _damaged(folder, f"{name} is missing or cut off")
    with ThreadPoolExecutor(1 + _CHECK_THREADS, thread_name_prefix="restore") as pool:
        restoring = pool.submit(_restore, folder / _TREE, shapes)
        found = _sums([folder / name for name in files], pool)
        altered = [name for name, (_, sums) in files.items() if found[folder / name] != sums]
    # Said first, for Orbax reports damage by bare exceptions, or not at all.
    if altered:
        raise _damaged(folder, f"{altered[0]} was altered")
    return restoring.result()


def _restore(tree: Path, shapes: dict[str, Any]) -> dict[str, jax.Array]:
    ocp = _orbax()
    arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
    with ocp.Checkpointer(_handler(ocp)) as checkpointer:
        request = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
        return dict(checkpointer.restore(tree, args=request))


def _damaged(folder: Path, how: str) -> InvalidArgument:
    return InvalidArgument(f"the checkpoint {folder} is damaged: {how}")


def discard(folder: Path, why: str) -> None:
    """Drop a damaged checkpoint, saying so."""
    _log.warning("dropping converted weights in %s: %s", folder, why)
    shutil.rmtree(folder, ignore_errors=True)


def _sums(files: Sequence[Path], pool: ThreadPoolExecutor) -> dict[Path, list[int]]:
    """The CRC-32 of each piece of each file."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, _PIECE_BYTES)]
    sums: dict[Path, list[int]] = {file: [] for file in files}
    for (file, _), value in zip(pieces, pool.map(lambda piece: _crc(*piece), pieces), strict=True):
        sums[file].append(value)
    return sums


def _crc(path: Path, start: int) -> int:
    value, left = 0, _PIECE_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (block := file.read(min(left, _READ_BYTES))):
            value, left = zlib.crc32(block, value), left - len(block)
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

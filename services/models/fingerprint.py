"""Whether a model is the one that it was: by its files' sizes and samples of what is in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmos.ipc.errors import IOFailure

SAMPLES = 64
SAMPLE_BYTES = 64 << 10


def fingerprint(source: Path, dtype: str) -> str:
    """A name for these weights in this type, whatever the files are called and wherever they lie.

    ``SAMPLES`` pieces spread evenly over each file count, so that even large models take a moment only: a
    model that was trained on is another in every piece. IOFailure if a file cannot be read.
    """
    found = hashlib.sha256(f"llmos model 1 {dtype}".encode())
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    try:
        for path in files:
            found.update(_sample(path))
    except OSError as error:
        raise IOFailure(f"{error.filename} cannot be read: {error.strerror}") from None
    return found.hexdigest()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    found = hashlib.sha256(size.to_bytes(8, "big"))
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))
            if size <= SAMPLE_BYTES:
                break
    return found.digest()

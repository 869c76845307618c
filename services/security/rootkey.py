"""The key that signs every token, made once and kept in the state folder."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from biscuit_auth import Algorithm, KeyPair, PrivateKey

from llmos.ipc import paths
from llmos.ipc.errors import AccessDenied

KEY_BYTES = 32


def load(state: Path) -> KeyPair:
    """The key pair of the state folder, made at the first call."""
    key = PrivateKey.from_bytes(secret(state, "root.key"), Algorithm.Ed25519)  # type: ignore[call-arg, attr-defined]
    return KeyPair.from_private_key(key)


def secret(state: Path, name: str) -> bytes:
    """32 secret bytes in ``state/keys/name``, made at the first call; AccessDenied if others may read."""
    paths.private_dir(state)
    path = paths.private_dir(state / "keys") / name
    if not path.exists():
        paths.write_private(path, secrets.token_bytes(KEY_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise AccessDenied(f"{path} must be yours and readable by you only: chmod 600 {path}")
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise AccessDenied(
            f"{path} is not a key of {KEY_BYTES} bytes: restore it, or remove it to begin anew"
        )
    return key

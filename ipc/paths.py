"""Where things lie: the run folder (sockets, tokens), the state folder (keys, logs), the cache (models).

``LLMOS_RUN``, ``LLMOS_STATE`` and ``LLMOS_CACHE`` override the XDG places, so several systems can run side
by side under one user.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from llmos.ipc.errors import AccessDenied, InvalidArgument

_SOCKET_PATH_BYTES = 107


def run_dir() -> Path:
    """The folder of sockets and tokens of the system this process belongs to."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    default = Path(base) / "llmos" if base else Path(tempfile.gettempdir()) / f"llmos-{os.getuid()}"
    return Path(os.environ.get("LLMOS_RUN") or default)


def state_dir() -> Path:
    """The folder of keys, logs and journals; survives a reboot."""
    return Path(os.environ.get("LLMOS_STATE") or _xdg("XDG_STATE_HOME", ".local/state") / "llmos")


def cache_dir() -> Path:
    """The folder of models, converted weights and compiled programs; may be deleted at any time."""
    return Path(os.environ.get("LLMOS_CACHE") or _xdg("XDG_CACHE_HOME", ".cache") / "llmos")


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback)


def private_dir(path: Path) -> Path:
    """Create a folder with mode 0700; refuse one that others own or may enter."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise AccessDenied(f"{path} must be a folder of yours that only you may enter: chmod 700 {path}")
    return path


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by one with mode 0600, in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def socket_address(name: str, run: Path | None = None) -> str:
    """The ZeroMQ address of a socket in the run folder."""
    path = (run or run_dir()) / f"{name}.sock"
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise InvalidArgument(f"socket path over {_SOCKET_PATH_BYTES} bytes: set LLMOS_RUN shorter: {path}")
    return f"ipc://{path}"


def token_path(name: str, run: Path | None = None) -> Path:
    """The file that holds the token of a service, driver or user."""
    return (run or run_dir()) / "tokens" / name


def read_token(name: str, run: Path | None = None) -> str:
    """The token of a service, driver or user; AccessDenied says what to do where it cannot be read."""
    path = token_path(name, run)
    try:
        return path.read_text().strip()
    except OSError as error:
        raise AccessDenied(
            f"no token at {path} ({error.strerror}): is the system up? try: llmos up"
        ) from None

"""What the supervisor lays into the run folder before the start, and what is removed after the stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmos.ipc import codec, paths
from llmos.ipc.grant import Grant
from llmos.services import manifest as manifests
from llmos.services.manifest import Manifest
from llmos.services.supervisor import grants as granting
from llmos.services.supervisor import status

SOCKETS = ("kernel", "control")
REMOVED = (
    "*.sock",
    "boot",
    "manifest",
    "gateway.url",
    "charges",
    status.FILE,
    f".{status.FILE}",
    ".boot.*",
    ".manifest.*",
    ".gateway.url.*",
    ".charges.*",
)


def prepare(run: Path, manifest: Manifest, grants: Mapping[str, Grant]) -> str:
    """Write tokens, the kernel's boot file and the manifest; returns the supervisor's own token.

    That one stays in this process's memory, as nobody else needs it.
    """
    tokens = granting.new_tokens(grants)
    folder = paths.private_dir(run / "tokens")
    for name, token in tokens.items():
        if name != granting.SUPERVISOR:
            paths.write_private(folder / name, token.encode())
    paths.write_private(run / "boot", codec.encode(granting.boot_file(grants, tokens)))
    manifests.write_running(manifest, run)
    return tokens[granting.SUPERVISOR]


def clear(run: Path) -> None:
    """Remove what a system leaves in its run folder, known names only; the lock must be held."""
    for pattern in REMOVED:
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)
    tokens = run / "tokens"
    if tokens.is_dir() and not tokens.is_symlink():
        for path in tokens.iterdir():
            path.unlink(missing_ok=True)
        tokens.rmdir()


def kernel_listens(run: Path) -> bool:
    """Whether the kernel has bound its sockets."""
    return all((run / f"{name}.sock").exists() for name in SOCKETS)

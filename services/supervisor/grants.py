"""Who may call what: boot.toml and the manifest -> the kernel's boot file and the tokens (pure)."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from llmos.ipc.errors import InvalidArgument
from llmos.ipc.grant import Band, Grant
from llmos.kernel.messages import BootEntry, BootFile
from llmos.services.manifest import Manifest
from llmos.services.supervisor.plan import SERVICES, driver_name

BOOT_RIGHTS = Path(__file__).parents[1] / "security" / "boot.toml"
SUPERVISOR, USER = "supervisor", "user"
TOKEN_BYTES = 32

DRIVER_METHODS: dict[str, tuple[str, ...]] = {
    "scheduler": ("execute", "encode", "preempt", "reset", "move", "save", "restore"),
    "models": ("load", "unload", "park", "wake", "load_adapter", "unload_adapter", "open"),
    USER: ("describe",),
}
"""The methods of every driver that a service, or the local user, may call."""


class Rights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of boot.toml."""

    calls: list[str]
    tenant: str = "system"
    models: list[str] = []
    band: Band = "batch"


def read_rights(path: Path = BOOT_RIGHTS) -> dict[str, Rights]:
    """The tables of boot.toml; InvalidArgument says what is wrong and where."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Rights])
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None


def boot_grants(manifest: Manifest, rights: Mapping[str, Rights]) -> dict[str, Grant]:
    """The grant of every process and of the local user; InvalidArgument where boot.toml names none."""
    drivers = [driver_name(spec) for spec in manifest.drivers]
    grants = {name: _grant(name, _of(rights, name), drivers, serves=name) for name in SERVICES}
    for name in drivers:
        grants[name] = _grant(name, _of(rights, "driver"), [], serves=name)
    for name in (SUPERVISOR, USER):
        grants[name] = _grant(name, _of(rights, name), drivers, serves="")
    return grants


def _of(rights: Mapping[str, Rights], name: str) -> Rights:
    if name not in rights:
        raise InvalidArgument(
            f"boot.toml has no table [{name}], so {name} may not run: add one, if only empty"
        )
    return rights[name]


def _grant(name: str, rights: Rights, drivers: Iterable[str], *, serves: str) -> Grant:
    added = [f"{driver}.{method}" for driver in drivers for method in DRIVER_METHODS.get(name, ())]
    return Grant(
        principal=name,
        tenant=rights.tenant,
        calls=[*rights.calls, *added],
        models=rights.models,
        band=rights.band,
        serves=serves,
    )


def new_tokens(names: Iterable[str]) -> dict[str, str]:
    """A fresh secret for each name, 32 random bytes in URL-safe base64."""
    return {name: secrets.token_urlsafe(TOKEN_BYTES) for name in names}


def boot_file(grants: Mapping[str, Grant], tokens: Mapping[str, str]) -> BootFile:
    """What the kernel is told: digests, never the tokens themselves."""
    digest = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in tokens.items()}
    return BootFile([BootEntry(digest[name], grant) for name, grant in grants.items()])

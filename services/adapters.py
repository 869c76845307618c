"""What adapters are called: MODEL:NAME by those who ask for one, NAME@FINGERPRINT inside.

The latter says which weights they are. It is what sequences start with and what salts the prefix cache: an
adapter that was changed has another, so nothing that was computed with the old one is found.
"""

from __future__ import annotations


def split(served: str) -> tuple[str, str]:
    """The model and the adapter's name in what a request calls a model; no name for the model itself."""
    model, _, name = served.partition(":")
    return model, name


def identity(name: str, fingerprint: str) -> str:
    """What an adapter with these weights is called inside."""
    return f"{name}@{fingerprint[:16]}"


def served(model: str, adapter: str) -> str:
    """What a request calls a model with an adapter that is called so inside."""
    return f"{model}:{adapter.partition('@')[0]}" if adapter else model

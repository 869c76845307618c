"""``llmos version``."""

from __future__ import annotations

import argparse
from importlib import metadata


def version(options: argparse.Namespace) -> int:
    """Print the installed version."""
    print(f"llmos {metadata.version('llmos')}")
    return 0

"""``llmos embed``: vectors of texts."""

from __future__ import annotations

import argparse
import sys

from llmos.ipc.errors import InvalidArgument
from llmos.services.models.messages import Embed, Embedded
from llmos.services.models.scores import unpack
from llmos.shell import session

ANSWER_SECONDS = 600.0
MAX_STDIN = 4 << 20


def embed(options: argparse.Namespace) -> int:
    """Print one JSON array for each text, in their order."""
    texts: list[str | list[int]] = [*(_lines() if options.text == ["-"] else options.text)]
    request = Embed(model=options.model, input=texts, truncate=options.truncate, band=options.band)
    with session.connect() as client:
        made = client.call("models.embed", request, Embedded, timeout=ANSWER_SECONDS)
    for row in unpack(made.vectors, made.width):
        print(f"[{', '.join(f'{value:.8g}' for value in row)}]")
    return 0


def _lines() -> list[str]:
    text = sys.stdin.read(MAX_STDIN + 1)
    if len(text) > MAX_STDIN:
        raise InvalidArgument(f"the texts on stdin are over {MAX_STDIN} characters")
    return [line for line in text.splitlines() if line.strip()]

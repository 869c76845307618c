"""A measured engine behind standard input and output: one JSON object a line, requests in, answers out.

{"do": "start", "batch": 8, "context": 256}   take 8 prompts of 256 tokens and decode once -> {}
{"do": "decode", "steps": 32}                 32 more tokens for each -> {"seconds": 0.9}
{"do": "prefill", "tokens": 512}              one prompt to its first token -> {"seconds": 0.4}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol


class Worker(Protocol):
    """One engine with one model loaded; all methods return when the work is done."""

    def start(self, batch: int, context: int) -> None:
        """Drop all sequences, and take ``batch`` new ones of ``context`` tokens each."""
        ...

    def decode(self, steps: int) -> None:
        """Choose ``steps`` tokens greedily for every sequence."""
        ...

    def prefill(self, tokens: int) -> None:
        """Drop all sequences, and run one prompt to its first token."""
        ...


def prompt(tokens: int, row: int = 0) -> list[int]:
    """Token ids that no two rows share a start of; ids below 3 are special in many vocabularies."""
    return [3 + (7 * i + 11 * row) % 40000 for i in range(tokens)]


def serve(make: Any) -> None:
    """Make a worker, say so, and answer until the input ends; what engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker = make()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        action = getattr(worker, request.pop("do"))
        begun = time.perf_counter()
        action(**request)
        print(json.dumps({"seconds": time.perf_counter() - begun}), file=answers, flush=True)

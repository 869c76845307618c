"""What to do to a process that should leave: ask it, then tell it, then end it."""

from __future__ import annotations

from typing import Literal

Action = Literal["ask", "terminate", "kill"]

ASK_SECONDS = 3.0
TERMINATE_SECONDS = 2.0


def action(elapsed: float, *, can_ask: bool, hurry: bool) -> Action:
    """The strongest means that is due ``elapsed`` seconds after a process was first asked to leave.

    ``can_ask``: the kernel answers and the process listens to it. ``hurry``: the operator asked twice.
    """
    if hurry:
        return "kill"
    patience = ASK_SECONDS if can_ask else 0.0
    if elapsed < patience:
        return "ask"
    return "terminate" if elapsed < patience + TERMINATE_SECONDS else "kill"

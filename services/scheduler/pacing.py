"""How many prompt tokens a step may compute so that the promises of those who decode in it are kept. Pure.

A realtime task that decodes has so many steps to go and so much time left: each of its steps may take the
quotient, or a little less, for what comes unforeseen. What the shortest of these leaves beside the decoding
itself may be used for prompts with a later deadline. So a new task waits a moment for those whose deadlines
are near, where it would else have to be refused for their sake.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import inf

from llmos.services.scheduler.host import Host
from llmos.services.scheduler.task import Task

SHARE = 0.95  # of the time to a deadline that may be used up
HOPELESS = 0.9  # of the steps without prompts: who needs shorter ones will be late
SAFETY = 1.02  # a promise assumes steps this much slower than the estimate
MESSAGES = 2.0e-3  # seconds for the messages between two quanta
FINEST = 16  # a chunk is no smaller than this fraction of the largest, than a page, or than pays


class Paces:
    """The room for realtime prompts in the next quantum, beside those who ``decoding`` in it."""

    def __init__(self, host: Host, decoding: list[Task], now: float) -> None:
        self._host = host
        self._load = len(decoding), sum(len(task.tokens) for task in decoding)
        clock = now + _in_flight(host, *self._load)
        promised = sorted((task for task in decoding if task.id in host.promised), key=lambda t: t.deadline)
        # Nobody waits for the sake of one who will be late all the same.
        hopeless = HOPELESS * host.times.seconds(*self._load, 0)
        self._deadlines, steps = list[float](), list[float]()
        for task in promised:
            left = max(1, task.limit - task.planned)
            if (step := (task.deadline - clock) / left) > hopeless:
                self._deadlines.append(task.deadline)
                steps.append(SHARE * step / (1.0 + host.times.slippage.share(left)))
        self._shortest = [inf, *accumulate(steps, min)]

    def room(self, task: Task) -> int:
        """Tokens of this task's prompt that each step may compute."""
        earlier = bisect_left(self._deadlines, task.deadline or inf)
        return room(self._host, *self._load, self._shortest[earlier])


def room(host: Host, rows: float, context: float, seconds: float) -> int:
    """Prompt tokens that fit in a step of so many ``seconds`` beside what decodes; 0 where hardly any do."""
    full = host.model.chunk_tokens
    if seconds == inf or not host.times:
        return full
    fits = host.times.prefill_room(rows, context, seconds / SAFETY)
    return 0 if fits < finest(host) else int(min(full, fits))


def finest(host: Host) -> int:
    """The smallest chunk worth a step."""
    full = host.model.chunk_tokens
    least = max(host.model.page_tokens, host.model.least_chunk, full // FINEST)
    return max(1, min(full, least))


def _in_flight(host: Host, rows: int, context: int) -> float:
    """Seconds until what was sent is done."""
    steps, prefilled = 0, 0
    for flight in host.flight:
        steps += flight.to_come
        prefilled += sum(chunk.length for chunk in flight.quantum.chunks if chunk.step >= flight.received)
    return steps * host.times.seconds(rows, context, prefilled / max(1, steps)) + MESSAGES

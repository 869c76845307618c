"""One answer being generated: tokens in, text out. No I/O; the time is handed in."""

from __future__ import annotations

from llmos.ipc.errors import IOFailure
from llmos.services.models.detokenizer import Detokenizer
from llmos.services.models.messages import Done, Text
from llmos.services.models.stops import StopFinder
from llmos.services.scheduler.messages import Finished, Submit


class Answer:
    """The text of one task; ``now`` arguments are in seconds of any one clock."""

    def __init__(self, submit: Submit, stops: list[str], detokenizer: Detokenizer, now: float) -> None:
        self._prompt = len(submit.tokens)
        self._stop_tokens = frozenset(submit.stop)
        self._detokenizer = detokenizer
        self._stops = StopFinder(stops)
        self._parts: list[str] = []
        self._count = 0
        self._began = now
        self._first = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the task may be ended."""
        return self._stops.found

    def feed(self, offset: int, tokens: list[int], now: float) -> Text | None:
        """What these tokens, the first of which is the answer's ``offset``-th, let us say.

        Tokens seen before are ignored. IOFailure where some were lost.
        """
        if offset > self._count:
            raise IOFailure(f"tokens {self._count} to {offset - 1} of the answer were lost")
        tokens = tokens[self._count - offset :]
        if not tokens or self.stopped:
            return None
        if not self._count:
            self._first = now - self._began
        self._count += len(tokens)
        shown = [token for token in tokens if token not in self._stop_tokens]
        return self._say(self._stops.feed(self._detokenizer.feed(shown)))

    def finish(self) -> Text | None:
        """The rest of the text, after the last token."""
        if self.stopped:
            return None
        text = self._stops.feed(self._detokenizer.finish())
        return self._say(text + self._stops.finish())

    def done(self, finished: Finished) -> Done:
        """The end as the scheduler told it."""
        cut_off = finished.reason == "length" and not self.stopped
        return Done(text="".join(self._parts), reason="length" if cut_off else "stop", usage=finished)

    def cut(self, now: float) -> Done:
        """The end by a stop string, told before the scheduler has ended the task."""
        usage = Finished(
            task=0,
            reason="stop",
            prompt_tokens=self._prompt,
            cached_tokens=0,
            completion_tokens=self._count,
            queued=0.0,
            first_token=self._first,
            total=now - self._began,
        )
        return Done(text="".join(self._parts), reason="stop", usage=usage)

    def _say(self, text: str) -> Text | None:
        if not text:
            return None
        self._parts.append(text)
        return Text(text, self._count)

"""Stop strings in a text that comes in pieces. Pure."""

from __future__ import annotations


class StopFinder:
    """Passes text on up to the first stop string; holds back only what may yet become one.

    The first to be complete wins, whatever the pieces are; of several complete at once, the longest.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is safe to show; nothing after a stop string was ``found``."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = _held_length(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and has become no stop string."""
        held, self._held = self._held, ""
        return held


def _held_length(text: str, stops: list[str]) -> int:
    """The length of the longest end of ``text`` that some stop string begins with."""
    longest = min(len(text), max(len(stop) for stop in stops) - 1)
    for length in range(longest, 0, -1):
        end = text[len(text) - length :]
        if any(stop.startswith(end) for stop in stops):
            return length
    return 0

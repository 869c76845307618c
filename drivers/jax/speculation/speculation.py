"""Whether a decode step verifies guesses: only where that is measured to give more tokens a second. Pure.

Each slot has an estimate of how likely a guess is right. With prompt lookup it is learned on every step, for
also a plain step computes what would have been guessed and compares it, so nothing has to be tried to find
out that a text has begun to repeat itself; a draft model is tried again now and then. The time of either kind
of step is measured per batch size, and the kind that is not in use is measured again now and then. At large
batches a verifying step costs more than its guesses bring, and speculation turns itself off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

FORGET = 0.93  # what an outcome counts for after the next
PRIOR = 2.0  # outcomes that the average of earlier sequences counts for
FIRST_GUESS = 0.5  # of the likelihood that a guess is right, before anything was seen
SAMPLES = 3  # steps of a kind that are timed before the kinds are compared
AGAIN = 128  # steps after which the other kind is timed anew: it may have been slow while others compiled
PROBE = 128  # steps after which guesses are tried again that cannot be compared without
GAIN = 1.05  # a verifying step must promise so many times the tokens a second of a plain one
PROMISING = 1.3  # tokens a step from which on the first verifying steps are tried
OUTLIER = 3.0
SMOOTHING = 0.1


@dataclass
class Acceptance:
    """How often guesses were right lately: ``hits`` of ``trials``, both fading."""

    hits: float
    trials: float

    @property
    def rate(self) -> float:
        return self.hits / self.trials

    def note(self, trials: int, hits: int) -> None:
        kept = FORGET**trials
        self.hits, self.trials = kept * self.hits + hits, kept * self.trials + trials

    def tokens(self, guesses: int) -> float:
        """Expected tokens of a step that verifies so many guesses, each right with the same likelihood."""
        rate = min(self.rate, 0.999)
        return (1.0 - rate ** (guesses + 1)) / (1.0 - rate)


@dataclass
class Timing:
    """Seconds of one kind of step: the least of the first few, then a moving average; its age in steps."""

    seconds: float = 0.0
    count: int = 0
    age: int = 0

    @property
    def known(self) -> bool:
        return self.count >= SAMPLES

    def forget(self) -> None:
        self.seconds, self.count = 0.0, 0

    def note(self, seconds: float) -> None:
        self.count, self.age = self.count + 1, 0
        if self.count <= SAMPLES:
            self.seconds = min(self.seconds or seconds, seconds)
        else:
            self.seconds += SMOOTHING * (min(seconds, OUTLIER * self.seconds) - self.seconds)


@dataclass
class Policy:
    """Chooses for each step; ``guesses`` is how many a verifying step has, ``sizes`` the batch sizes that it
    exists for. ``blind`` says that plain steps tell nothing about guesses. ``always`` verifies wherever it
    can (for tests and for measuring)."""

    guesses: int
    sizes: Iterable[int]
    blind: bool = False
    always: bool = False
    general: Acceptance = field(default_factory=lambda: Acceptance(FIRST_GUESS * PRIOR, PRIOR))
    _trying: int = 0
    _slots: dict[int, Acceptance] = field(default_factory=dict)
    _times: dict[tuple[int, int], Timing] = field(default_factory=dict)

    def begin(self, slot: int) -> None:
        """Another sequence is in a slot: it is expected to be like those before."""
        self._slots[slot] = Acceptance(self.general.rate * PRIOR, PRIOR)

    def choose(self, slots: list[int], size: int) -> int:
        """How many guesses the next step verifies for these slots in a batch of ``size``: all or none."""
        if size not in self.sizes:
            return 0
        if self.always:
            return self.guesses
        plain, verifying = self._time(size, 0), self._time(size, self.guesses)
        plain.age += 1
        verifying.age += 1
        if not plain.known:
            return 0
        expected = sum(self._slots[slot].tokens(self.guesses) for slot in slots) / len(slots)
        if self.blind and (self._trying or not verifying.known or verifying.age > PROBE):
            self._trying = (self._trying or SAMPLES) - 1
            return self.guesses
        if verifying.age > AGAIN:
            verifying.forget()
        if not verifying.known:
            return self.guesses if expected >= PROMISING else 0
        if plain.age > AGAIN:
            plain.forget()
            return 0
        worthwhile = expected * plain.seconds > GAIN * verifying.seconds
        return self.guesses if worthwhile else 0

    def observe(self, slot: int, trials: int, hits: int) -> None:
        """What became of the guesses for a slot in one step."""
        if trials:
            self._slots[slot].note(trials, hits)
            self.general.note(trials, hits)

    def timed(self, size: int, guesses: int, seconds: float) -> None:
        """A step without prefill took so long."""
        self._time(size, guesses).note(seconds)

    def _time(self, size: int, guesses: int) -> Timing:
        return self._times.setdefault((size, guesses), Timing())

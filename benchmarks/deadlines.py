"""Realtime requests with deadlines beside batch work that saturates: how many of those admitted were late?

Batch work has all slots and half as many tasks again in the queue, for as long as it takes. Realtime
requests come in bursts of up to half of the slots, with deadlines from less than they take on an idle
system to several times what they take in a full one, until so many were admitted as were asked for. Of each
burst one that was refused comes back, with the deadline that the refusal named. A request is missed that got
an error instead of its end, or its end too late by the client's clock.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from benchmarks.play import Play, Request, say
from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.client import Client
from llmos.services.scheduler.messages import SchedulerStats

TIGHT, LOOSE = 0.7, 4.0  # of what a request takes alone on an idle system, and in a full one
AGAIN = 1.1, 0.01  # of the deadline that a refusal named, and seconds for the way
PROBES = 8
LIMIT_SECONDS = 60.0


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--admitted", type=int, default=200, help="realtime requests to admit")
    parser.add_argument("--realtime-count", type=int, default=32, help="tokens of such a request")


class Trial:
    """One run; ``batch`` is what is under way, ``realtime`` all that was ever sent. ``stall`` is the longest
    that this process was kept from its work: on a machine where that is much, misses say little."""

    def __init__(self, play: Play, model: LoadedModel, options: Any) -> None:
        self._play = play
        self._model = model
        self._options = options
        self._rng = random.Random(7)
        self._ended = 0
        self.stall = 0.0
        self.batch: list[Request] = []
        self.realtime: list[Request] = []
        self.retried: list[Request] = []

    def request(self, deadline: float = 0.0) -> Request:
        """A realtime request that shares its prompt with none."""
        return Request("realtime", self._prompt(), self._options.realtime_count, deadline=deadline)

    def saturate(self) -> None:
        """Replace batch requests that have ended."""
        left = [request for request in self.batch if not request.ended]
        self._ended += len(self.batch) - len(left)
        self.batch = left
        while len(self.batch) < round(1.5 * self._model.slots):
            request = Request("batch", self._prompt(), self._options.count)
            self._play.send(request)
            self.batch.append(request)

    def wait(self, seconds: float) -> None:
        """Keep the system full for so long."""
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            began, pause = time.perf_counter(), min(left, 0.05)
            self._play.poll(pause)
            self.stall = max(self.stall, time.perf_counter() - began - pause)
            self.saturate()

    def wait_for(self, requests: Sequence[Request]) -> None:
        while not all(request.ended for request in requests):
            self.wait(0.01)

    def send(self, deadline: float) -> Request:
        request = self.request(deadline)
        self._play.send(request)
        self.realtime.append(request)
        return request

    def burst(self, tight: float, loose: float) -> None:
        """Some requests at once; when all were admitted or refused, the last that was refused comes back."""
        count = self._rng.randint(1, max(1, self._model.slots // 2))
        sent = [self.send(self._rng.uniform(tight, loose)) for _ in range(count)]
        while not all(request.ended or request.times for request in sent):
            self.wait(0.005)
        for request in [request for request in sent if request.refused][-1:]:
            self.retried.append(self.send(AGAIN[0] * request.earliest + AGAIN[1]))

    def pause(self, mean: float) -> float:
        return self._rng.expovariate(1.0 / mean)

    @property
    def begun(self) -> int:
        """How many batch requests have had a token, or an end."""
        return self._ended + sum(bool(request.times) for request in self.batch)

    @property
    def admitted(self) -> int:
        """Those that have ended without a refusal, or run."""
        return sum(not r.refused and bool(r.ended or r.times) for r in self.realtime)

    def end(self) -> None:
        for request in self.batch:
            self._play.withdraw(request)

    def _prompt(self) -> list[int]:
        return [self._rng.randrange(self._model.vocab_size) for _ in range(self._options.prompt)]


def measure(play: Play, client: Client, model: LoadedModel, options: Any) -> dict[str, Any]:
    """Calibrate on an idle and on a full system, then send bursts until enough were admitted."""
    trial = Trial(play, model, options)
    say("deadlines: on an idle system")
    idle = [took(play, trial.request()) for _ in range(PROBES)]
    say("deadlines: filling the slots with batch work")
    trial.saturate()
    while trial.begun < model.slots:
        trial.wait(0.05)
    full = [trial.send(60.0) for _ in range(PROBES)]
    trial.wait_for(full)
    trial.realtime.clear()
    alone, beside = median(idle), median([r.ended - r.sent for r in full])
    say(f"deadlines: a request takes {alone:.3f} s alone and {beside:.3f} s in a full system")
    before, begun = client.call("scheduler.stats", None, SchedulerStats), time.perf_counter()
    while trial.admitted < options.admitted and time.perf_counter() - begun < LIMIT_SECONDS:
        trial.burst(TIGHT * alone, LOOSE * beside)
        trial.wait(trial.pause(2.0 * beside))
        say(f"deadlines: {len(trial.realtime)} sent, {trial.admitted} of {options.admitted} admitted")
    trial.wait_for(trial.realtime)
    seconds = time.perf_counter() - begun
    after = client.call("scheduler.stats", None, SchedulerStats)
    trial.end()
    return {
        "alone_ms": round(1e3 * alone, 1),
        "beside_batch_ms": round(1e3 * beside, 1),
        "seconds": round(seconds, 1),
        "tokens_per_s": round((after.tokens - before.tokens) / seconds, 1),
        "longest_stall_ms": round(1e3 * trial.stall, 1),
        "displaced": after.displaced - before.displaced,
        **summary(trial.realtime, trial.retried),
    }


def took(play: Play, request: Request) -> float:
    play.run([request])
    return request.ended - request.sent


def summary(requests: Sequence[Request], retried: Sequence[Request]) -> dict[str, Any]:
    """What came of the requests; ``slack`` is the part of its time that a request had left at its end."""
    refused, admitted = [r for r in requests if r.refused], [r for r in requests if not r.refused]
    kept = [r for r in admitted if not r.error]
    slack = sorted(1 - (r.ended - r.sent) / r.deadline for r in kept)
    answers = sorted(1e3 * (r.ended - r.sent) for r in refused)
    return {
        "sent": len(requests),
        "admitted": len(admitted),
        "missed": sum(r.missed for r in admitted) + sum(s < 0 for s in slack),
        "worst_ms_late": round(max((late(r) for r in admitted), default=0.0), 1),
        "failed_otherwise": sum(bool(r.error) and not r.missed for r in admitted),
        "slack_least": round(slack[0], 4) if slack else 0.0,
        "slack_p50": round(median(slack), 4) if slack else 0.0,
        "refused": len(refused),
        "refusal_p50_ms": round(median(answers), 2) if answers else 0.0,
        "refusal_max_ms": round(answers[-1], 2) if answers else 0.0,
        "came_back": len(retried),
        "came_back_and_admitted": sum(not r.refused for r in retried),
    }


def late(request: Request) -> float:
    """Milliseconds from a request's deadline to its end, 0 where it was in time."""
    return max(0.0, 1e3 * (request.ended - request.sent - request.deadline))


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]

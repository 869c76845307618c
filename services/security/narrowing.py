"""What is left of a grant under the checks that holders appended to its token. Pure, but for ``passes``.

A request is a set of facts, of which checks may speak (docs/security.md has the vocabulary): ``operation``
and ``model`` are what is asked for, the others are the ceilings of the grant that is asked under. The result
is sound for any checks: every operation of it passes with every model of it, under its ceilings, at every
moment until it expires. It is found by testing candidates, so it can be narrower than the checks would
allow, never wider:

- A dimension that no check mentions is as the authority has it, wildcards included.
- In one that is mentioned no wildcard survives, since no number of tests tells what *any* name would do:
  candidates are the names of the authority and the strings in the checks that the authority covers.
- Ceilings are searched from the loosest among the authority's and the constants in the checks.
- Checks compare times with constants only, so between two dates in the token nothing changes: the grant
  ends at the first date at which it would not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import msgspec

from llmos.ipc.errors import AccessDenied
from llmos.ipc.grant import BANDS, Grant
from llmos.services.security.blocks import Appended
from llmos.services.security.rights import LIMITS, covers_call, covers_model

Facts = Mapping[str, str | int]
Passes = Callable[[Facts], bool]
Pair = tuple[str | None, str | None]

DIMENSIONS = ("operation", "model", "band", "time", *LIMITS)
NO_LIMIT = (1 << 63) - 1
MAX_NAMES = 256
MAX_TESTS = 1024
MAX_STEPS = 1 << 16  # tests times operations in the checks
LAST_DATE = 253_402_300_799  # the end of the year 9999, in seconds


def narrow(grant: Grant, text: str, appended: Appended, now: int, passes: Passes) -> Grant:
    """The rights of ``grant`` that pass; AccessDenied where none are left.

    ``text`` is the source of the appended blocks, ``now`` in seconds since the Unix epoch; ``passes`` says
    whether a request with these facts passes all checks.
    """
    mentioned = {name for name in DIMENSIONS if f"{name}(" in text}
    test = _Budget(passes, appended.operations)
    calls = _calls(grant, appended) if "operation" in mentioned else [None]
    models = _models(grant, appended) if "model" in mentioned else [None]
    choices = {name: _ceilings(name, grant, appended) for name in mentioned if name in ("band", *LIMITS)}
    lowest: dict[str, str | int] = {name: values[-1] for name, values in choices.items()}
    witness = next((pair for pair in product(calls, models) if test(_facts(pair, lowest, now))), None)
    if witness is None:
        raise AccessDenied("the checks in this token leave nothing that it allows")
    ceilings = _raise(choices, lowest, lambda chosen: test(_facts(witness, chosen, now)))
    times = _times(grant, appended, now) if "time" in mentioned else [now]
    expires = next((t for t in times if not test(_facts(witness, ceilings, t))), 0)
    valid = [t for t in times if not expires or t < expires]

    def always(call: str | None, model: str | None) -> bool:
        return all(test(_facts((call, model), ceilings, t)) for t in valid)

    left_models = [model for model in models if always(witness[0], model)]
    left_calls = [c for c in calls if always(c, witness[1]) and all(always(c, m) for m in left_models)]
    return _result(grant, left_calls, left_models, ceilings, expires)


class _Budget:
    """Remembers what was tested, and bounds how much is."""

    def __init__(self, passes: Passes, operations: int) -> None:
        self._passes = passes
        self._left = min(MAX_TESTS, MAX_STEPS // max(1, operations))
        self._known: dict[frozenset[tuple[str, str | int]], bool] = {}

    def __call__(self, facts: Facts) -> bool:
        key = frozenset(facts.items())
        if key not in self._known:
            if len(self._known) >= self._left:
                raise AccessDenied(
                    "the checks in this token are too many to evaluate: name fewer calls or models"
                )
            self._known[key] = self._passes(facts)
        return self._known[key]


def _facts(pair: Pair, ceilings: Facts, time: int) -> dict[str, str | int]:
    call, model = pair
    facts: dict[str, str | int] = {"time": time, **ceilings}
    if call is not None:
        facts["operation"] = call
    if model:
        facts["model"] = model
    return facts


def _calls(grant: Grant, appended: Appended) -> list[str | None]:
    names = dict.fromkeys((*grant.calls, *appended.strings))
    return _bounded([n for n in names if not n.endswith("*") and covers_call(grant.calls, n)])


def _models(grant: Grant, appended: Appended) -> list[str | None]:
    others = {*grant.calls, *DIMENSIONS}
    names = dict.fromkeys((*grant.models, *(text for text in appended.strings if text not in others)))
    # "" stands for no model at all: where none can be allowed, calls that need none are tested without one.
    return _bounded([n for n in names if n != "*" and covers_model(grant.models, n)]) or [""]


def _bounded(names: list[str]) -> list[str | None]:
    if len(names) > MAX_NAMES:
        raise AccessDenied(f"over {MAX_NAMES} names in one token")
    return list(names)


def _ceilings(name: str, grant: Grant, appended: Appended) -> Sequence[str | int]:
    """The values to try, loosest first."""
    if name == "band":
        return BANDS[BANDS.index(grant.band) :]
    top = getattr(grant, name) or NO_LIMIT
    near = {value + step for value in appended.integers for step in (-1, 0, 1)}
    return sorted({top, *(value for value in near if 0 < value <= top)}, reverse=True)


def _raise(
    choices: Mapping[str, Sequence[str | int]], lowest: Facts, test: Callable[[Facts], bool]
) -> dict[str, str | int]:
    """From the lowest ceilings, each in turn as high as passes."""
    chosen = dict(lowest)
    for name, values in choices.items():
        chosen[name] = next((v for v in values if test({**chosen, name: v})), lowest[name])
    return chosen


def _times(grant: Grant, appended: Appended, now: int) -> list[int]:
    """Now and every later moment at which what passes may change."""
    end = min(grant.expires // 1_000_000 or LAST_DATE, LAST_DATE)
    return [now, *sorted({t for date in appended.dates for t in (date, date + 1) if now < t <= end})]


def _result(
    grant: Grant, calls: list[str | None], models: list[str | None], ceilings: Facts, expires: int
) -> Grant:
    limits = {name: 0 if value == NO_LIMIT else value for name, value in ceilings.items()}
    return msgspec.structs.replace(
        grant,
        calls=grant.calls if calls == [None] else [call for call in calls if call],
        models=grant.models if models == [None] else [model for model in models if model],
        expires=min(filter(None, (expires * 1_000_000, grant.expires)), default=0),
        **limits,
    )

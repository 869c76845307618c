"""Whether one grant lies within another. Pure."""

from __future__ import annotations

from collections.abc import Collection

from llmos.ipc.grant import ANY, BANDS, Grant

LIMITS = ("max_tokens", "max_running", "max_queued", "max_pages", "tokens_per_minute")
SYSTEM = "system"


def covers_call(allowed: Collection[str], call: str) -> bool:
    """Whether a list of "service.method" and "service.*" allows a call; "service.*" needs itself there."""
    service, _, method = call.rpartition(".")
    return bool(service and method) and (call in allowed or f"{service}.{ANY}" in allowed)


def covers_model(allowed: Collection[str], model: str) -> bool:
    """Whether a list of model names and "*" allows a model; "*" needs itself there."""
    return bool(model) and (model in allowed or ANY in allowed)


def exceeds(child: Grant, parent: Grant) -> list[str]:
    """The fields in which a child asks for more than its parent has; none if it lies within.

    The principal is a name within the tenant, not a right. Only the system may act for another tenant.
    """
    wrong = []
    if not child.principal or not child.tenant or parent.tenant not in (child.tenant, SYSTEM):
        wrong.append("tenant")
    if not all(covers_call(parent.calls, call) for call in child.calls):
        wrong.append("calls")
    if not all(covers_model(parent.models, model) for model in child.models):
        wrong.append("models")
    if BANDS.index(child.band) < BANDS.index(parent.band):
        wrong.append("band")
    if not 0 <= child.weight <= parent.weight:
        wrong.append("weight")
    if child.serves not in ("", parent.serves):
        wrong.append("serves")
    wrong += [name for name in ("expires", *LIMITS) if _looser(getattr(child, name), getattr(parent, name))]
    return wrong


def within(child: Grant, parent: Grant) -> bool:
    """Whether all that a child allows, its parent allows."""
    return not exceeds(child, parent)


def _looser(child: int, parent: int) -> bool:
    return child < 0 or (parent > 0 and not 0 < child <= parent)

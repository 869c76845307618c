"""Whether one grant lies within another. Pure."""

from __future__ import annotations

from collections.abc import Collection

from llmos.ipc.grant import ANY, BANDS, Grant

LIMITS = ("max_tokens", "max_running", "max_queued", "max_pages", "tokens_per_minute")
SYSTEM = "system"
ANY_TENANT = "any_tenant"


def covers_call(allowed: Collection[str], call: str) -> bool:
    """Whether a list of "service.method" and "service.*" allows a call; "service.*" needs itself there, and
    so does "service.any_tenant", which is no method but a right over others."""
    service, _, method = call.rpartition(".")
    wildcard = method != ANY_TENANT and f"{service}.{ANY}" in allowed
    return bool(service and method) and (call in allowed or wildcard)


def acts_for(parent: Grant, tenant: str) -> bool:
    """Whether a grant reaches this tenant's tokens: its own, or with ``security.any_tenant`` everyone's but
    the system's; the system reaches all."""
    anyone = f"security.{ANY_TENANT}" in parent.calls and tenant != SYSTEM
    return parent.tenant in (tenant, SYSTEM) or anyone


def covers_model(allowed: Collection[str], model: str) -> bool:
    """Whether a list of model names and "*" allows a model; "*" needs itself there."""
    return bool(model) and (model in allowed or ANY in allowed)


def exceeds(child: Grant, parent: Grant) -> list[str]:
    """The fields in which a child asks for more than its parent has; none if it lies within.

    The principal is a name within the tenant, not a right.
    """
    wrong = []
    if not child.principal or not child.tenant or not acts_for(parent, child.tenant):
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

"""Whether a tenant may have one more task. Refusals name the limit in ``exceeded``, and say when to come
again where that helps. Pure; ``max_running`` refuses nobody, and is kept where slots are given out."""

from __future__ import annotations

from llmos.ipc.errors import AccessDenied, Busy
from llmos.ipc.grant import Grant
from llmos.services.scheduler.limits import RateLimits

RETRY_AFTER = 1.0  # what a full queue tells its callers


def check_room(grant: Grant, waiting: int, most: int, mine: int) -> None:
    """Busy where ``most`` tasks of all tenants wait, or as many of this one as it may have waiting."""
    if waiting >= most:
        raise Busy(f"{waiting} tasks are waiting; try again later", exceeded="queue", retry_after=RETRY_AFTER)
    if grant.max_queued and mine >= grant.max_queued:
        raise Busy(
            f"{mine} tasks of this tenant are waiting, and its max_queued is {grant.max_queued}; "
            "try again later",
            exceeded="max_queued",
            retry_after=RETRY_AFTER,
        )


def check_rate(grant: Grant, rates: RateLimits, tokens: int, now: float) -> None:
    """A task pays for its prompt and all it may produce; at its end it gets back what it left. Busy where
    that is too much by now, AccessDenied where it always is."""
    wait = rates.wait(grant.tenant, grant.tokens_per_minute, tokens, now)
    if wait == float("inf"):
        raise AccessDenied(
            f"this capability's tokens_per_minute is {grant.tokens_per_minute}, and the request may take "
            f"{tokens}: ask for less",
            exceeded="tokens_per_minute",
        )
    if wait:
        raise Busy(
            f"the tenant's {grant.tokens_per_minute} tokens_per_minute are used up; wait {wait:.1f} s",
            exceeded="tokens_per_minute",
            retry_after=round(wait, 3),
        )


def check_pages(grant: Grant, tokens: int, page_tokens: int) -> None:
    """AccessDenied for a task that would not fit in all pages of its tenant."""
    if grant.max_pages and tokens > grant.max_pages * page_tokens:
        raise AccessDenied(
            f"{tokens} tokens do not fit in this capability's max_pages, {grant.max_pages} of {page_tokens} "
            "tokens: ask for less",
            exceeded="max_pages",
        )


def check_tokens(grant: Grant, tokens: int) -> None:
    """AccessDenied where one task may not produce so many tokens."""
    if grant.max_tokens and tokens > grant.max_tokens:
        raise AccessDenied(
            f"this capability's max_tokens is {grant.max_tokens}, not {tokens}", exceeded="max_tokens"
        )

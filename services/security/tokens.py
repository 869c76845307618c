"""A grant as a Biscuit token, attenuation of tokens by whoever holds them, and a token back as a grant.

The authority block says it all in one fact, ``grant("…")``, the grant as JSON. Beside it are ``principal``
and ``tenant`` for checks to speak of, and ``issuer``, the public root key, so that a holder can append blocks
with nothing but the token in hand. One fact and not one for each call, so that no check of a holder can join
over them. Raw tokens are malleable: what names a token is its revocation ids, never its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec
from biscuit_auth import (
    Algorithm,
    AuthorizationError,
    AuthorizerBuilder,
    Biscuit,
    BiscuitBlockError,
    BiscuitBuilder,
    BiscuitSerializationError,
    BiscuitValidationError,
    BlockBuilder,
    DataLogError,
    Fact,
    KeyPair,
    PublicKey,
    Rule,
    UnverifiedBiscuit,
)

from llmos.ipc import limits
from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.ipc.grant import ANY, BANDS, Band, Grant
from llmos.services.security import blocks, narrowing
from llmos.services.security.blocks import Appended
from llmos.services.security.rights import LIMITS, covers_call, covers_model

T = TypeVar("T")

NAME = re.compile(r"[\w.@/-]{1,128}")

# The engine's own limits are a second fence; blocks.py has made sure that they are not needed. The engine
# measures wall time, and its default of 1 ms refuses good tokens on a machine that is merely busy.
MAX_TIME = timedelta(seconds=1)
MAX_FACTS = 100
MAX_ITERATIONS = 10
FAILURES = (
    AuthorizationError,
    BiscuitBlockError,
    BiscuitSerializationError,
    BiscuitValidationError,
    DataLogError,
    ValueError,
)


class Token(NamedTuple):
    """A token, and its revocation ids from the authority block outwards."""

    text: str
    ids: list[str]


class Parsed(NamedTuple):
    """A token whose signatures are good: its authority block's grant, its ids, and what was appended."""

    biscuit: Biscuit
    authority: Grant
    ids: list[str]
    appended: Appended


def mint(grant: Grant, root: KeyPair) -> Token:
    """A token for a grant; ``grant.chain`` holds the ids of the token that its minter was called under."""
    for name in (grant.principal, grant.tenant):
        if not NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r}: a principal or tenant has 1 to 128 letters, digits, or any of ._@/-"
            )
    said = {
        "grant": msgspec.json.encode(grant).decode(),
        "principal": grant.principal,
        "tenant": grant.tenant,
        "issuer": bytes(root.public_key.to_bytes()).hex(),
    }
    builder = BiscuitBuilder("".join(f"{name}({{{name}}});" for name in said), said)
    if grant.expires:
        builder.add_code("check if time($t), $t < {end};", {"end": _date(-(-grant.expires // 1_000_000))})
    biscuit = builder.build(root.private_key)
    text = biscuit.to_base64()
    if len(text) > limits.TOKEN_BYTES // 2:
        raise InvalidArgument(f"a grant of {len(text)} characters: name fewer calls and models")
    return Token(text, list(biscuit.revocation_ids))


def parse(text: str, root: PublicKey) -> Parsed:
    """A token that we signed, whether it has expired or not; AccessDenied for one that is not ours, or holds
    more than checks of the kinds that are evaluated here."""
    if len(text) > limits.TOKEN_BYTES:
        raise AccessDenied(f"a token of over {limits.TOKEN_BYTES} characters is not accepted")
    biscuit = _guarded(lambda: Biscuit.from_base64(text, root), "this is not a token of this system")
    # Before anything of it is evaluated: reading the authority's fact runs the rules of every block.
    appended = blocks.read(bytes(biscuit.to_bytes()))
    return Parsed(biscuit, _authority(biscuit), list(biscuit.revocation_ids), appended)


def verify(parsed: Parsed, now: int, revoked: Container[str]) -> Grant:
    """The grant of a token now (microseconds since the Unix epoch): what all its blocks allow, no more.

    Raises AccessDenied for a token that has expired, is revoked, or allows nothing.
    """
    grant = msgspec.structs.replace(parsed.authority, chain=[*parsed.authority.chain, *parsed.ids])
    if any(id in revoked for id in grant.chain):
        raise AccessDenied("this token was revoked")
    if 0 < grant.expires <= now:
        raise AccessDenied("this token has expired")
    if len(parsed.ids) == 1:
        return grant
    source = "".join(parsed.biscuit.block_source(number) for number in range(1, len(parsed.ids)))
    return narrowing.narrow(
        grant, source, parsed.appended, now // 1_000_000, lambda f: allows(parsed.biscuit, f)
    )


def allows(biscuit: Biscuit, facts: narrowing.Facts) -> bool:
    """Whether a request with these facts passes every check of a token; ``time`` is in seconds."""

    def run() -> bool:
        builder = _authorizer("allow if true;")
        for name, value in facts.items():
            builder.add_fact(Fact(f"{name}({{v}})", {"v": _date(value) if name == "time" else value}))
        builder.build(biscuit).authorize()
        return True

    try:
        return _guarded(run, "refused")
    except AccessDenied:
        return False


def attenuate(
    text: str,
    *,
    calls: Iterable[str] | None = None,
    models: Iterable[str] | None = None,
    band: Band | None = None,
    expires: int = 0,
    **ceilings: int,
) -> str:
    """A token with less rights, made by appending a block of checks; needs no server and no key.

    ``expires`` in microseconds since the Unix epoch; ``ceilings`` are ``max_tokens``, ``max_running``,
    ``max_queued``, ``max_pages`` and ``tokens_per_minute``. What is left out stays as it is. Raises
    InvalidArgument for what the token does not allow in the first place, and where nothing is asked for.
    """
    grant = read(text)
    checks: list[tuple[str, dict[str, object]]] = []
    if calls is not None:
        checks.append(("operation($v), {is}.contains($v)", {"is": _narrowed_calls(grant, calls)}))
    if models is not None:
        checks.append(("model($v), {is}.contains($v)", {"is": _narrowed_models(grant, models)}))
    if band is not None:
        checks.append(("band($v), {is}.contains($v)", {"is": set(BANDS[BANDS.index(band) :])}))
    if expires:
        checks.append(("time($v), $v < {is}", {"is": _date(expires // 1_000_000)}))
    for name, value in ceilings.items():
        if name not in LIMITS or value <= 0:
            raise InvalidArgument(f"{name}={value}: a limit is one of {', '.join(LIMITS)} and positive")
        checks.append((f"{name}($v), $v <= {{is}}", {"is": value}))
    if not checks:
        raise InvalidArgument("say what to take away")
    block = BlockBuilder("")
    for code, parameters in checks:
        block.add_code(f"check if {code};", parameters)
    return append(text, block)


def append(text: str, block: BlockBuilder) -> str:
    """A token with one more block."""

    def extend() -> str:
        # The signature is checked against the key that the token itself names: that proves nothing, and a
        # holder needs no proof. The engine writes out only what it has checked.
        issuer = bytes.fromhex(_said(text, "issuer"))
        key = PublicKey.from_bytes(issuer, Algorithm.Ed25519)  # type: ignore[call-arg, attr-defined]
        return str(Biscuit.from_base64(text, key).append(block).to_base64())

    return _guarded(extend, "this is not a token, or it was sealed")


def read(text: str) -> Grant:
    """What the authority block of a token says, without a check of its signature: for its holder only."""
    return _decode(_said(text, "grant"))


def _said(text: str, name: str) -> str:
    """The string in a fact of the authority block, unverified."""
    source = _guarded(lambda: str(UnverifiedBiscuit.from_base64(text).block_source(0)), "this is not a token")
    # The engine prints strings as they are, without escapes; neither JSON nor a key has a line feed.
    start = f'{name}("'
    line = next((line for line in source.split("\n") if line.startswith(start)), "")
    return line.removeprefix(start).removesuffix('");')


def _authorizer(code: str) -> AuthorizerBuilder:
    builder = AuthorizerBuilder(code)
    bounds = builder.limits()  # type: ignore[attr-defined]
    bounds.max_time, bounds.max_facts, bounds.max_iterations = MAX_TIME, MAX_FACTS, MAX_ITERATIONS
    builder.set_limits(bounds)  # type: ignore[attr-defined]
    return builder


def _authority(biscuit: Biscuit) -> Grant:
    def query() -> list[str]:
        # Only facts of the authority block: those of appended ones are out of the engine's default scope.
        facts = _authorizer("").build(biscuit).query(Rule("said($grant) <- grant($grant)"))
        return [str(fact.terms[0]) for fact in facts]

    said = _guarded(query, "this token cannot be read")
    if len(said) != 1:
        raise AccessDenied("this token has no grant")
    return _decode(said[0])


def _decode(said: str) -> Grant:
    try:
        return msgspec.json.decode(said, type=Grant)
    except msgspec.DecodeError:
        raise AccessDenied("this token has no grant that can be read") from None


def _narrowed_calls(grant: Grant, calls: Iterable[str]) -> set[str]:
    """The calls to keep; "service.*" stands for those of that service that the token names."""
    kept: set[str] = set()
    for call in calls:
        service = call.removesuffix(ANY)
        inside = (
            {own for own in grant.calls if own.startswith(service)} if call.endswith(f".{ANY}") else {call}
        )
        if not inside or not all(covers_call(grant.calls, own) for own in inside):
            raise InvalidArgument(f"the token does not allow {call}")
        if any(own.endswith(ANY) for own in inside):
            raise InvalidArgument(f"name the methods of {call} to keep: a check cannot hold a wildcard")
        kept |= inside
    if not kept:
        raise InvalidArgument("a token without calls allows nothing: revoke it instead")
    return kept


def _narrowed_models(grant: Grant, models: Iterable[str]) -> set[str]:
    kept = set(models)
    for model in kept:
        if model == ANY or not covers_model(grant.models, model):
            raise InvalidArgument(f"the token does not allow to narrow its models to {model!r}")
    if not kept:
        raise InvalidArgument("to allow no model, leave out the calls that use one")
    return kept


def _date(seconds: int | str) -> datetime:
    return datetime.fromtimestamp(min(int(seconds), narrowing.LAST_DATE), UTC)


def _guarded(operation: Callable[[], T], refusal: str) -> T:
    """Run the engine on what others wrote: any failure of it, a panic too, is a refusal."""
    try:
        return operation()
    except FAILURES:
        raise AccessDenied(refusal) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a Rust panic becomes; not an Exception
            raise
        raise AccessDenied(refusal) from None

"""Tokens: what is minted is what is verified, and what is appended can only take away."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import msgspec
import pytest
from biscuit_auth import BiscuitBuilder, BlockBuilder, KeyPair
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmos.ipc import limits
from llmos.ipc.errors import AccessDenied, InvalidArgument
from llmos.ipc.grant import Grant
from llmos.services.security import blocks, tokens
from llmos.services.security.narrowing import LAST_DATE, NO_LIMIT
from llmos.services.security.rights import LIMITS, within

ROOT = KeyPair()
NOW = 1_800_000_000  # seconds: 2027-01-15T08:00:00Z
GRANT = Grant(
    principal="alice",
    tenant="local",
    calls=["models.chat", "models.list", "scheduler.submit"],
    models=["a", "b"],
    band="interactive",
    max_tokens=1000,
)


def minted(**changes: object) -> str:
    return tokens.mint(msgspec.structs.replace(GRANT, **changes), ROOT).text


def verified(text: str, now: int = NOW, revoked: set[str] | None = None) -> Grant:
    return tokens.verify(tokens.parse(text, ROOT.public_key), now * 1_000_000, revoked or set())


def appended(text: str, *sources: str) -> str:
    for source in sources:
        text = tokens.append(text, BlockBuilder(source))
    return text


def rights(grant: Grant) -> Grant:
    return msgspec.structs.replace(grant, chain=[])


def test_a_token_carries_its_grant() -> None:
    grant = msgspec.structs.replace(
        GRANT, models=["*"], expires=(NOW + 60) * 1_000_000, weight=0.25, tokens_per_minute=7
    )
    token = tokens.mint(grant, ROOT)
    back = verified(token.text)
    assert rights(back) == grant
    assert back.chain == token.ids
    assert tokens.read(token.text) == grant


def test_the_chain_of_the_minter_comes_first() -> None:
    text = minted(chain=["ab" * 64])
    text = tokens.attenuate(text, models=["a"])
    chain = verified(text).chain
    assert chain[0] == "ab" * 64
    assert len(chain) == 3


@pytest.mark.parametrize("text", ["", "x", "!!!", "é", "A" * 400, "A" * (limits.TOKEN_BYTES + 1)])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(AccessDenied):
        verified(text)


def test_a_token_of_another_root_is_refused() -> None:
    with pytest.raises(AccessDenied, match="not a token of this system"):
        verified(tokens.mint(GRANT, KeyPair()).text)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_token_changed_anywhere_is_refused_or_means_the_same(data: st.DataObject) -> None:
    text = tokens.attenuate(minted(), models=["a"])
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    try:
        changed = verified(text[:at] + letter + text[at + 1 :])
    except AccessDenied:
        return
    assert changed == verified(text)


def test_a_token_without_its_last_block_is_refused() -> None:
    """The proof at the end of a token fits its last block only."""
    raw = bytes(tokens.parse(tokens.attenuate(minted(), models=["a"]), ROOT.public_key).biscuit.to_bytes())
    kept = b"".join(
        bytes([number << 3 | 2]) + varint(len(value)) + value
        for number, value in blocks._fields(raw)
        if number != blocks.TOKEN_BLOCK and isinstance(value, bytes)
    )
    with pytest.raises(AccessDenied, match="not a token of this system"):
        verified(base64.urlsafe_b64encode(kept).decode())


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def test_an_expired_token_is_refused() -> None:
    text = minted(expires=NOW * 1_000_000 + 1)
    assert verified(text).expires == NOW * 1_000_000 + 1
    with pytest.raises(AccessDenied, match="expired"):
        verified(text, NOW + 1)


def test_a_revoked_token_is_refused_and_so_is_all_derived_from_it() -> None:
    parent = tokens.mint(GRANT, ROOT)
    child = tokens.attenuate(parent.text, models=["a"])
    sibling = tokens.attenuate(parent.text, models=["b"])
    ids = verified(child).chain
    with pytest.raises(AccessDenied, match="revoked"):
        verified(child, revoked={parent.ids[0]})
    with pytest.raises(AccessDenied, match="revoked"):
        verified(child, revoked={ids[-1]})
    assert verified(sibling, revoked={ids[-1]}).models == ["b"]
    with pytest.raises(AccessDenied, match="revoked"):
        verified(minted(chain=["ab" * 64]), revoked={"ab" * 64})


def test_attenuation_takes_away_exactly_what_it_says() -> None:
    child = verified(
        tokens.attenuate(
            minted(),
            calls=["models.*"],
            models=["b"],
            band="batch",
            expires=(NOW + 60) * 1_000_000,
            max_tokens=10,
            max_pages=5,
        )
    )
    assert rights(child) == Grant(
        principal="alice",
        tenant="local",
        calls=["models.chat", "models.list"],
        models=["b"],
        band="batch",
        expires=(NOW + 60) * 1_000_000,
        max_tokens=10,
        max_pages=5,
    )


def test_attenuation_of_any_model_to_one() -> None:
    text = minted(models=["*"])
    assert verified(tokens.attenuate(text, models=["x"])).models == ["x"]
    assert verified(tokens.attenuate(text, max_tokens=5)).models == ["*"]


def test_attenuation_twice_leaves_what_both_allow() -> None:
    text = tokens.attenuate(minted(), models=["a", "b"], max_tokens=100, expires=(NOW + 9) * 1_000_000)
    text = tokens.attenuate(text, models=["b"], calls=["models.chat"], max_tokens=200)
    child = verified(text)
    assert (child.models, child.calls, child.max_tokens) == (["b"], ["models.chat"], 100)
    assert child.expires == (NOW + 9) * 1_000_000


def test_attenuation_does_not_extend_an_expiry() -> None:
    text = minted(expires=(NOW + 5) * 1_000_000)
    assert verified(tokens.attenuate(text, expires=(NOW + 9) * 1_000_000)).expires == (NOW + 5) * 1_000_000


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"calls": []},
        {"calls": ["kernel.stop"]},
        {"calls": ["kernel.*"]},
        {"models": []},
        {"models": ["c"]},
        {"models": ["*"]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"weight": 1},
    ],
)
def test_attenuation_that_makes_no_sense_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        tokens.attenuate(minted(), **asked)  # type: ignore[arg-type]


def test_what_is_no_token_cannot_be_attenuated() -> None:
    with pytest.raises(AccessDenied):
        tokens.attenuate("nonsense", max_tokens=1)


def test_a_grant_too_long_for_a_token_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="fewer"):
        minted(models=[f"model-{number}" for number in range(2000)])


@pytest.mark.parametrize("name", ["", "x" * 200, 'a");tenant("b', "line\nfeed"])
def test_names_that_could_be_read_otherwise_are_not_minted(name: str) -> None:
    with pytest.raises(InvalidArgument):
        minted(principal=name)


@pytest.mark.parametrize(
    "source",
    [
        'grant("{}")',
        'operation("kernel.stop")',
        'model("secret")',
        'tenant("system")',
        "right($x) <- tenant($x)",
        "grant($x) <- tenant($x)",
        'check if model($m), ["a"].any($x -> $x == $m)',
        'check if model($m), $m.matches("a|secret")',
        "check if {1}.all($x -> true)",
        'check if {"a": 1}.get("a") == 1',
    ],
)
def test_blocks_that_hold_more_than_checks_are_refused(source: str) -> None:
    with pytest.raises(AccessDenied, match=r"block may hold|not accepted"):
        verified(appended(minted(), source))


def test_a_second_authority_cannot_be_smuggled_in() -> None:
    """A block that says what an authority says is a block like any other."""
    forged = BiscuitBuilder('grant("x"); grant("y");').build(ROOT.private_key).to_base64()
    with pytest.raises(AccessDenied, match="no grant"):
        verified(forged)


def test_a_join_that_never_ends_is_refused_at_once() -> None:
    facts = "".join(f"f({number});" for number in range(60))
    started = time.monotonic()
    with pytest.raises(AccessDenied):
        verified(appended(minted(), f"{facts} check if f($a), f($b), f($c), f($d), f($e), $a + $e > 500"))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "source",
    [
        "check if true" + " || true" * 600,
        'check if operation($o), ($o + "' + "x" * 4000 + '"' + " + $o" * 9 + ') != ""',
        "; ".join(["check if 1 + 1 == 2"] * 9),
    ],
    ids=["operations", "one long sum", "many sums"],
)
def test_checks_that_are_long_to_evaluate_are_refused(source: str) -> None:
    with pytest.raises(AccessDenied, match="not accepted"):
        verified(appended(minted(), source))


def test_many_blocks_are_refused() -> None:
    with pytest.raises(AccessDenied, match="over 16 blocks"):
        verified(appended(minted(), *["check if true"] * 16))


def test_reading_a_token_runs_no_rule_of_a_holder() -> None:
    facts = "".join(f"f({number});" for number in range(60))
    started = time.monotonic()
    with pytest.raises(AccessDenied, match="may hold checks only"):
        tokens.parse(
            appended(minted(), f"{facts} g($a, $b, $c, $d) <- f($a), f($b), f($c), f($d)"), ROOT.public_key
        )
    assert time.monotonic() - started < 1


def test_a_token_that_takes_long_to_weigh_is_refused() -> None:
    calls = [f"models.call{number}" for number in range(60)]
    models = ", ".join(f'"m{number}"' for number in range(60))
    text = appended(
        minted(calls=calls, models=["*"]), f"check if operation($o), model($m), {{{models}}}.contains($m)"
    )
    started = time.monotonic()
    with pytest.raises(AccessDenied, match="too many"):
        verified(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("check", "calls", "models"),
    [
        ('check if operation("models.chat")', ["models.chat"], ["*"]),
        ('check if model("x")', GRANT.calls, ["x"]),
        ('check if model($m), $m.starts_with("x")', GRANT.calls, ["x"]),
        ('reject if operation("models.chat")', ["models.list", "scheduler.submit"], ["*"]),
        ('reject if operation("models.chat"), model("x"); check if model($m), {"x", "y"}.contains($m)',
         GRANT.calls, ["y"]),
        ('check if tenant("local")', GRANT.calls, ["*"]),
        ("check if true", GRANT.calls, ["*"]),
    ],
)  # fmt: skip
def test_checks_of_any_kind_are_weighed(check: str, calls: list[str], models: list[str]) -> None:
    grant = verified(appended(minted(models=["*"]), check))
    assert (grant.calls, sorted(grant.models)) == (calls, models)


def test_where_calls_and_models_depend_on_each_other_every_pair_left_passes() -> None:
    """Any model may be listed, only "x" may be used: a grant cannot say that, so it says less."""
    text = appended(minted(models=["*"]), 'check if operation("models.list") or model("x")')
    grant = verified(text)
    assert (grant.calls, grant.models) == (GRANT.calls, ["x"])


@pytest.mark.parametrize(
    "check",
    [
        "check if false",
        'check if model("c")',
        'check if tenant("system")',
        'check if operation("kernel.stop")',
        "check if time($t), $t < 2020-01-01T00:00:00Z",
        "check if time($t), $t + 5 == 3",
        "check if 9223372036854775807 + 1 > 0",
        "check if unheard($x)",
    ],
)
def test_checks_that_leave_nothing_refuse_the_token(check: str) -> None:
    with pytest.raises(AccessDenied):
        verified(appended(minted(), check))


@pytest.mark.parametrize(
    "check",
    [
        "check if model($m), $m.length() > 3",
        'reject if model($m), $m.ends_with("et")',
        'check if model($m), $m != "q"',
    ],
)
def test_any_model_does_not_survive_a_check_on_models(check: str) -> None:
    """No number of tried names shows that every name passes."""
    try:
        assert "*" not in verified(appended(minted(models=["*"]), check)).models
    except AccessDenied:
        return


# --- no block widens: random checks of every kind, against the engine itself ---

NAMES = st.sampled_from(["m.x", "m.y", "n.x", "a", "b", "c"])
NUMBERS = st.integers(-1, 12)
DATES = st.integers(-3, 6).map(lambda d: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW + d)))
COMPARE = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
QUERIES = st.one_of(
    st.builds(lambda n: f'operation("{n}")', NAMES),
    st.builds(lambda n, o: f'operation($o), $o {o} "{n}"', NAMES, st.sampled_from(["==", "!="])),
    st.builds(lambda n: f'model($m), $m.starts_with("{n}")', NAMES),
    st.builds(lambda n, o: f'model($m), {{"{n}", "{o}"}}.contains($m)', NAMES, NAMES),
    st.builds(lambda n, o: f'operation($o), model($m), $o == "{n}" || $m != "{o}"', NAMES, NAMES),
    st.builds(lambda n, o: f'operation($o), model("{n}"), $o != "{o}"', NAMES, NAMES),
    st.builds(lambda c, n: f"max_tokens($n), $n {c} {n}", COMPARE, NUMBERS),
    st.builds(lambda c, n: f"max_pages($n), max_tokens($k), $n {c} $k + {n}", COMPARE, NUMBERS),
    st.builds(lambda c, d: f"time($t), $t {c} {d}", COMPARE, DATES),
    st.builds(lambda n, c, d: f'operation($o), time($t), $o == "{n}" || $t {c} {d}', NAMES, COMPARE, DATES),
    st.builds(lambda b: f'band("{b}")', st.sampled_from(["realtime", "interactive", "batch"])),
    st.just('tenant("t")'),
    st.just("true"),
)
CHECKS = st.one_of(
    st.builds(lambda qs: "check if " + " or ".join(qs), st.lists(QUERIES, min_size=1, max_size=3)),
    st.builds(lambda q: f"check all {q}", QUERIES),
    st.builds(lambda q: f"reject if {q}", QUERIES),
)
AUTHORITIES = st.builds(
    Grant,
    principal=st.just("p"),
    tenant=st.just("t"),
    calls=st.lists(st.sampled_from(["m.x", "m.y", "n.x", "m.*"]), min_size=1, max_size=3, unique=True),
    models=st.lists(st.sampled_from(["a", "b", "*"]), max_size=2, unique=True),
    band=st.sampled_from(["realtime", "interactive"]),
    expires=st.sampled_from([0, (NOW + 4) * 1_000_000]),
    max_tokens=st.sampled_from([0, 8]),
    max_pages=st.sampled_from([0, 3]),
)


def requests(grant: Grant) -> Iterator[dict[str, str | int]]:
    """Every request that a grant allows, wildcards and times by samples."""
    calls = {c for name in grant.calls for c in (["m.x", "m.y", "m.z"] if name == "m.*" else [name])}
    models = {m for name in grant.models for m in (["a", "b", "c", "zzz"] if name == "*" else [name])}
    end = grant.expires // 1_000_000 or NOW + 10
    ceilings = {name: getattr(grant, name) or NO_LIMIT for name in LIMITS}
    for moment in [*range(NOW, end), *([LAST_DATE] if not grant.expires else [])]:
        for call in calls:
            for model in models:
                yield {"operation": call, "model": model, "band": grant.band, "time": moment, **ceilings}


@given(AUTHORITIES, st.lists(st.lists(CHECKS, min_size=1, max_size=3).map("; ".join), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_block_widens(authority: Grant, sources: list[str]) -> None:
    text = appended(tokens.mint(authority, ROOT).text, *sources)
    try:
        parsed = tokens.parse(text, ROOT.public_key)
        grant = tokens.verify(parsed, NOW * 1_000_000, set())
    except AccessDenied:
        assume(False)
    assert within(grant, authority)
    assert grant.calls
    for facts in requests(grant):
        assert tokens.allows(parsed.biscuit, facts), (grant, facts)


ATTENUATIONS = st.fixed_dictionaries(
    {},
    optional={
        "calls": st.lists(st.sampled_from(GRANT.calls), min_size=1, unique=True),
        "models": st.lists(st.sampled_from(GRANT.models), min_size=1, unique=True),
        "band": st.sampled_from(["realtime", "interactive", "batch"]),
        "expires": st.integers(NOW + 1, NOW + 100).map(lambda s: s * 1_000_000),
        "max_tokens": st.integers(1, 2000),
        "max_running": st.integers(1, 9),
    },
).filter(bool)


@given(st.lists(ATTENUATIONS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_attenuations_meet_in_their_intersection(steps: list[dict[str, object]]) -> None:
    text = minted()
    expected = {
        "calls": set(GRANT.calls),
        "models": set(GRANT.models),
        "max_tokens": GRANT.max_tokens,
        "max_running": 1 << 62,
        "expires": 1 << 62,
    }
    band = ["realtime", "interactive", "batch"].index(GRANT.band)
    for step in steps:
        text = tokens.attenuate(text, **step)  # type: ignore[arg-type]
        for name, value in step.items():
            if name == "band":
                band = max(band, ["realtime", "interactive", "batch"].index(str(value)))
            elif isinstance(value, list):
                expected[name] = expected[name] & set(value)  # type: ignore[operator]
            else:
                expected[name] = min(expected[name], value)  # type: ignore[call-overload]
    if not expected["calls"] or not expected["models"]:
        with pytest.raises(AccessDenied):
            verified(text)
        return
    grant = verified(text)
    assert (set(grant.calls), set(grant.models)) == (expected["calls"], expected["models"])
    assert grant.band == ["realtime", "interactive", "batch"][band]
    assert grant.max_tokens == expected["max_tokens"]
    assert (grant.max_running or 1 << 62) == expected["max_running"]
    assert (grant.expires or 1 << 62) == expected["expires"]

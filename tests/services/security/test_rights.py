"""Rights a child holds are always within its parent's."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc.grant import Grant
from llmos.services.security.rights import covers_call, covers_model, exceeds, within

PARENT = Grant(
    principal="p",
    tenant="t",
    calls=["models.chat", "scheduler.*"],
    models=["a", "b"],
    band="interactive",
    expires=1000,
    max_tokens=100,
    max_pages=10,
)


def child(**changes: object) -> Grant:
    return msgspec.structs.replace(PARENT, **changes)


def test_the_same_rights_are_within() -> None:
    assert within(PARENT, PARENT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", "other"),
        ("tenant", ""),
        ("calls", ["models.load"]),
        ("calls", ["models.*"]),
        ("calls", ["models.chat", "kernel.stop"]),
        ("calls", ["*"]),
        ("calls", ["*.*"]),
        ("calls", ["scheduler."]),
        ("calls", [".chat"]),
        ("models", ["c"]),
        ("models", ["*"]),
        ("models", [""]),
        ("band", "realtime"),
        ("expires", 0),
        ("expires", 1001),
        ("expires", -1),
        ("max_tokens", 0),
        ("max_tokens", 101),
        ("max_pages", -1),
        ("max_running", -1),
        ("weight", 1.1),
        ("weight", -1.0),
        ("weight", float("nan")),
        ("serves", "memory"),
    ],
)
def test_more_is_refused_by_name(field: str, value: object) -> None:
    assert exceeds(child(**{field: value}), PARENT) == [field]


@pytest.mark.parametrize(
    "changes",
    [
        {"calls": []},
        {"calls": ["scheduler.kill", "scheduler.*"]},
        {"models": ["b"]},
        {"band": "batch"},
        {"expires": 999},
        {"max_tokens": 1},
        {"max_running": 5},
        {"weight": 0.5},
        {"principal": "someone"},
    ],
)
def test_less_is_within(changes: dict[str, object]) -> None:
    assert within(child(**changes), PARENT)


def test_only_the_system_mints_for_another_tenant() -> None:
    assert within(child(tenant="other"), child(tenant="system"))
    assert not within(child(tenant="system"), child(tenant="other"))


def test_the_right_for_any_tenant_reaches_all_but_the_system() -> None:
    own = [*child().calls, "security.any_tenant"]
    assert within(child(tenant="other"), child(tenant="t", calls=own))
    assert not within(child(tenant="system"), child(tenant="t", calls=own))


def test_a_right_over_others_needs_itself_and_no_wildcard() -> None:
    assert covers_call(["security.any_tenant"], "security.any_tenant")
    assert not covers_call(["security.*"], "security.any_tenant")
    assert not within(child(tenant="other"), child(calls=[*child().calls, "security.*"]))


def test_a_wildcard_covers_its_service_only() -> None:
    assert covers_call(["models.*"], "models.chat")
    assert covers_call(["driver.jax0.*"], "driver.jax0.load")
    assert not covers_call(["driver.*"], "driver.jax0.load")
    assert not covers_call(["models.chat"], "models.*")
    assert covers_model(["*"], "x")
    assert not covers_model(["*"], "")


GRANTS = st.builds(
    Grant,
    principal=st.just("p"),
    tenant=st.sampled_from(["t", "u", "system"]),
    calls=st.lists(st.sampled_from(["a.x", "a.y", "a.*", "b.x"]), max_size=3),
    models=st.lists(st.sampled_from(["m", "n", "*"]), max_size=2),
    band=st.sampled_from(["realtime", "interactive", "batch"]),
    expires=st.integers(0, 3),
    max_tokens=st.integers(0, 3),
    weight=st.sampled_from([0.5, 1.0]),
)


@given(GRANTS, GRANTS, GRANTS)
def test_within_is_transitive(a: Grant, b: Grant, c: Grant) -> None:
    if within(a, b) and within(b, c):
        assert within(a, c)


@given(GRANTS, GRANTS, st.sampled_from(["a.x", "a.y", "a.z", "b.x"]), st.sampled_from(["m", "n", "o"]))
def test_whatever_a_child_may_do_its_parent_may(a: Grant, b: Grant, call: str, model: str) -> None:
    if within(a, b):
        assert not covers_call(a.calls, call) or covers_call(b.calls, call)
        assert not a.may_use(model) or b.may_use(model)
        assert all(b.may_run_in(band) for band in ("realtime", "interactive", "batch") if a.may_run_in(band))

"""A driver is made as the manifest says, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.drivers.null.driver import NullDriver
from llmos.drivers.sdk import __main__ as sdk
from llmos.drivers.sdk.driver import Driver
from llmos.ipc.errors import InvalidArgument, NotFound
from llmos.services.manifest import DriverSpec


def spec(**options: Any) -> DriverSpec:
    return DriverSpec(name="d", kind="null", options=options)


def test_options_are_the_drivers_and_whole_numbers_will_do() -> None:
    assert isinstance(sdk.create(spec(step_ms=1, encoder="e", room=2)), NullDriver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_ms": "7"}, "option step_ms of driver 'd': Expected `float`, got `str`"),
        ({"room": 1.5}, "option room of driver 'd': Expected `int`, got `float`"),
        ({"stepms": 7.0}, "driver 'd' has no option stepms; there is: step_ms, prefill_us"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        sdk.create(spec(**options))


def test_a_driver_may_take_any_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lenient(Driver):
        def __init__(self, **options: str) -> None:
            self.options = options

    monkeypatch.setattr(sdk, "find", lambda kind: Lenient)
    made = sdk.create(spec(color="red"))
    assert isinstance(made, Lenient)
    assert made.options == {"color": "red"}


def test_a_driver_without_options_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Driver):
        def __init__(self) -> None: ...

    monkeypatch.setattr(sdk, "find", lambda kind: Plain)
    with pytest.raises(InvalidArgument, match="has no option step_ms; there is: none"):
        sdk.create(spec(step_ms=1.0))


def test_a_kind_that_is_not_installed_is_refused_with_those_that_are() -> None:
    with pytest.raises(NotFound, match="no driver 'cuda' is installed; there is: jax, null"):
        sdk.create(DriverSpec(name="d", kind="cuda"))

"""``python -m llmos.drivers.sdk NAME``: run the driver that the manifest has under this name."""

from __future__ import annotations

import inspect
import logging
import sys
from importlib.metadata import entry_points
from typing import Any, get_type_hints

import msgspec

from llmos.drivers.sdk.driver import Driver
from llmos.drivers.sdk.server import DriverServer
from llmos.ipc.errors import InvalidArgument, LLMOSError, NotFound
from llmos.services import manifest
from llmos.services.manifest import DriverSpec

GROUP = "llmos.drivers"


def find(kind: str) -> type[Driver]:
    """The driver class behind a kind; NotFound lists the kinds that are installed."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in known:
        raise NotFound(f"no driver {kind!r} is installed; there is: {', '.join(sorted(known))}")
    cls = known[kind].load()
    if not (isinstance(cls, type) and issubclass(cls, Driver)):
        raise InvalidArgument(f"{known[kind].value} is no subclass of llmos.drivers.sdk.driver.Driver")
    return cls


def create(spec: DriverSpec) -> Driver:
    """A driver made with the options of the manifest; InvalidArgument names an option that does not fit."""
    cls = find(spec.kind)
    known, types = inspect.signature(cls).parameters, _types(cls)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    for name, value in spec.options.items():
        if name not in known and not takes_any:
            there = ", ".join(known) or "none"
            raise InvalidArgument(f"driver {spec.name!r} has no option {name}; there is: {there}")
        try:
            msgspec.convert(value, types.get(name, Any))
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"option {name} of driver {spec.name!r}: {error}") from None
    try:
        return cls(**spec.options)
    except TypeError as error:
        raise InvalidArgument(f"options of driver {spec.name!r}: {error}") from None


def _types(cls: type[Driver]) -> dict[str, Any]:
    """Those that a driver's options are declared to have, as far as a manifest can have them."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # declared by what only a type checker imports
        return {}
    return {name: hint for name, hint in hints.items() if hint in (bool, int, float, str)}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m llmos.drivers.sdk NAME", file=sys.stderr)
        return 2
    try:
        specs = {spec.name: spec for spec in manifest.read_running().drivers}
        if sys.argv[1] not in specs:
            raise NotFound(f"the manifest has no driver {sys.argv[1]!r}; there is: {', '.join(specs)}")
        DriverServer(sys.argv[1], create(specs[sys.argv[1]])).serve()
    except LLMOSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

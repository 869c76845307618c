"""``python -m llmos.drivers.sdk NAME``: run the driver that the manifest has under this name."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

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
    """A driver made with the options of the manifest."""
    cls = find(spec.kind)
    try:
        return cls(**spec.options)
    except TypeError as error:
        raise InvalidArgument(f"options of driver {spec.name!r}: {error}") from None


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

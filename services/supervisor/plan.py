"""Manifest -> the processes of the system, in the order in which they are stopped backwards."""

from __future__ import annotations

import msgspec

from llmos.services.manifest import DriverSpec, Manifest

KERNEL = "kernel"
SERVICES_BELOW = ("security", "memory")
SERVICES_ABOVE = ("scheduler", "models", "monitor", "gateway")
SERVICES = (*SERVICES_BELOW, *SERVICES_ABOVE)

KERNEL_STAGE, SERVICE_STAGE, DRIVER_STAGE = range(3)
SERVICE_START_SECONDS = 60.0
DRIVER_START_SECONDS = 300.0


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process. ``module`` is run as ``python -m``; ``command`` replaces it by any program.

    Processes of one ``stage`` start together, without waiting for each other; those of the next start when
    these are ready or had their time. ``devices`` lets it see the settings of accelerators in the
    environment. It must register within ``start_limit`` seconds.
    """

    name: str
    module: str = ""
    arguments: list[str] = []
    command: list[str] = []
    environment: dict[str, str] = {}
    stage: int = SERVICE_STAGE
    devices: bool = False
    start_limit: float = SERVICE_START_SECONDS


def driver_name(spec: DriverSpec) -> str:
    """The name a driver registers under."""
    return f"driver.{spec.name}"


def plan(manifest: Manifest) -> list[Process]:
    """Every process, each after those it calls: stopped backwards, none loses what it works with.

    No process depends on the order of the start, since a call to one that is not up yet is repeated. The
    stages make it quick: on few cores the kernel is up sooner alone, and drivers, which import a numerics
    library, would take the processors from the services.
    """
    return [
        Process(name=KERNEL, module="llmos.kernel", stage=KERNEL_STAGE),
        *(_service(name) for name in SERVICES_BELOW),
        *(_driver(spec) for spec in manifest.drivers),
        *(_service(name) for name in SERVICES_ABOVE),
    ]


def _service(name: str) -> Process:
    return Process(name=name, module=f"llmos.services.{name}")


def _driver(spec: DriverSpec) -> Process:
    return Process(
        name=driver_name(spec),
        module="" if spec.command else "llmos.drivers.sdk",
        arguments=[] if spec.command else [spec.name],
        command=spec.command,
        environment=spec.environment,
        stage=DRIVER_STAGE,
        devices=True,
        start_limit=DRIVER_START_SECONDS,
    )

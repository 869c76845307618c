"""What is started, and in which order it is stopped."""

from __future__ import annotations

from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.supervisor.plan import DRIVER_STAGE, KERNEL_STAGE, SERVICES, Process, plan

TWO = Manifest(
    drivers=[
        DriverSpec(name="jax0", environment={"XLA_FLAGS": "x"}),
        DriverSpec(name="other", command=["/opt/driver", "--fast"]),
    ],
    models=[ModelSpec(name="m")],
)


def by_name(manifest: Manifest) -> dict[str, Process]:
    return {process.name: process for process in plan(manifest)}


def test_the_default_manifest_needs_every_service_and_one_driver() -> None:
    names = [process.name for process in plan(Manifest())]
    assert sorted(names) == sorted(["kernel", *SERVICES, "driver.jax0"])


def test_the_kernel_starts_first_and_drivers_last() -> None:
    stages = {process.name: process.stage for process in plan(TWO)}
    assert min(stages.values()) == stages["kernel"] == KERNEL_STAGE
    assert max(stages.values()) == stages["driver.other"] == DRIVER_STAGE


def test_stopped_backwards_nobody_loses_what_it_works_with() -> None:
    order = [process.name for process in reversed(plan(Manifest()))]
    expected = ["gateway", "models", "scheduler", "driver.jax0", "memory", "kernel"]
    assert [name for name in order if name in expected] == expected


def test_a_driver_runs_under_the_sdk_or_as_its_own_program() -> None:
    processes = by_name(TWO)
    assert (processes["driver.jax0"].module, processes["driver.jax0"].arguments) == (
        "llmos.drivers.sdk",
        ["jax0"],
    )
    assert processes["driver.jax0"].environment == {"XLA_FLAGS": "x"}
    assert processes["driver.other"].command == ["/opt/driver", "--fast"]
    assert processes["driver.other"].module == ""


def test_only_drivers_see_the_settings_of_devices() -> None:
    assert [p.name for p in plan(TWO) if p.devices] == ["driver.jax0", "driver.other"]

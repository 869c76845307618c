"""Fake services under the real kernel and the real supervisor: ``system.py NAME[:HABIT]...``."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from llmos.ipc.errors import LLMOSError
from llmos.ipc.grant import Grant
from llmos.services.manifest import Manifest
from llmos.services.supervisor.plan import DRIVER_STAGE, KERNEL, KERNEL_STAGE, SERVICE_STAGE, Process
from llmos.services.supervisor.system import run_system

SERVICE = str(Path(__file__).with_name("service.py"))


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    processes = [Process(name=KERNEL, module="llmos.kernel", stage=KERNEL_STAGE)]
    grants = {
        "supervisor": Grant(principal="supervisor", tenant="system", calls=["kernel.names", "kernel.stop"])
    }
    calls = ["kernel.names"]
    for argument in sys.argv[1:]:
        name, *habits = argument.split(":")
        processes.append(
            Process(
                name=name,
                command=[sys.executable, SERVICE, name, *habits],
                stage=DRIVER_STAGE if name.startswith("driver.") else SERVICE_STAGE,
            )
        )
        grants[name] = Grant(principal=name, tenant="system", serves=name)
        calls.append(f"{name}.*")
    grants["user"] = Grant(principal="user", tenant="local", calls=calls)
    manifest = Manifest(restarts=3, restart_window=30.0)
    try:
        return run_system(processes, grants, manifest, time.time())
    except LLMOSError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

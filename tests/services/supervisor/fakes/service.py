"""A service that does nothing but what a test needs: ``service.py NAME [stubborn] [crash]``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.server import Incoming, Server, method
from llmos.kernel.messages import Beat


class Fake(Server):
    def beat(self) -> Beat:
        return Beat(self.progress, limit=1.0)

    def stop(self) -> None:
        with (Path(os.environ["LLMOS_STATE"]) / "stopped").open("a") as file:
            file.write(f"{self.service}\n")

    @method
    def pid(self, request: None, call: Incoming) -> int:
        return os.getpid()

    @method
    def environment(self, request: None, call: Incoming) -> dict[str, str]:
        return dict(os.environ)

    @method
    def hang(self, request: None, call: Incoming) -> None:
        while True:
            time.sleep(60)


def main() -> None:
    name, *habits = sys.argv[1:]
    if "crash" in habits:
        sys.exit("a fault in the fake service")
    if "once" in habits and not (mark := paths.state_dir() / f"{name}.once").exists():
        mark.touch()
        sys.exit("a fault in the first run only")
    fake = Fake(name=name)
    if "stubborn" in habits:
        signal.signal = lambda *_: None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        fake.finish = lambda: None  # type: ignore[method-assign]
    fake.serve()


if __name__ == "__main__":
    main()

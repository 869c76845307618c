"""``python -m llmos.services.monitor``: the monitor process, started by the supervisor."""

from __future__ import annotations

import logging

from llmos.services.monitor.server import MonitorServer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    MonitorServer().serve()


if __name__ == "__main__":
    main()

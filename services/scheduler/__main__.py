"""``python -m llmos.services.scheduler``: the scheduler process."""

from __future__ import annotations

import logging

from llmos.services.scheduler.server import Scheduler


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    Scheduler().serve()


if __name__ == "__main__":
    main()

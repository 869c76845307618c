"""``python -m llmos.services.scheduler``: the scheduler process."""

from __future__ import annotations

import gc
import logging

from llmos.services.scheduler.server import Scheduler

COLLECT_SECONDS = 1.0


def main() -> None:
    """Serve. The cyclic collector looks at every token of every task: it does so while there is none."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    scheduler = Scheduler()
    gc.disable()
    scheduler.every(COLLECT_SECONDS, lambda: _collect(scheduler))
    scheduler.serve()


def _collect(scheduler: Scheduler) -> None:
    gc.collect(1 if scheduler.core.tasks else 2)


if __name__ == "__main__":
    main()

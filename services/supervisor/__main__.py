"""``python -m llmos.services.supervisor [--manifest FILE]``: the whole system, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path

from llmos.ipc.errors import LLMOSError
from llmos.services.supervisor.child import die_with
from llmos.services.supervisor.system import supervise

CANNOT_START = 2


def main() -> int:
    """Run the system; the exit status: 0 stopped in order, 1 gave up, 2 could not start."""
    started = time.time()
    parser = argparse.ArgumentParser(prog="llmos.services.supervisor", description=__doc__)
    parser.add_argument("--manifest", type=Path, help="a TOML file that says what the system consists of")
    parser.add_argument("--follow", type=int, metavar="PID", help="stop when this parent process dies")
    arguments = parser.parse_args()
    if arguments.follow:
        die_with(arguments.follow, signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return supervise(arguments.manifest, started)
    except LLMOSError as error:
        print(f"llmos: {error}", file=sys.stderr)
        return CANNOT_START


if __name__ == "__main__":
    sys.exit(main())

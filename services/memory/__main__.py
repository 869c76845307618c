"""``python -m llmos.services.memory``: the memory process, started by the supervisor."""

from __future__ import annotations

import logging

from llmos.services.memory.server import MemoryServer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    MemoryServer().serve()


if __name__ == "__main__":
    main()

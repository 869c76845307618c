"""``python -m llmos.services.security``: the security process, started by the supervisor."""

from __future__ import annotations

import logging

from llmos.services.security.server import SecurityServer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    SecurityServer().serve()


if __name__ == "__main__":
    main()

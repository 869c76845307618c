"""``python -m llmos.services.gateway``: the gateway process, started by the supervisor."""

from __future__ import annotations

import logging

from llmos.services.gateway.server import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    main()

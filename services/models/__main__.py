"""``python -m llmos.services.models``: the models process, started by the supervisor."""

from __future__ import annotations

import logging

from llmos.services.models.server import ModelsServer


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    ModelsServer().serve()


if __name__ == "__main__":
    main()

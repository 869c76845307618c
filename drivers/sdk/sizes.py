"""How many pages the tiers beside the device get, where a load request says it in bytes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from llmos.drivers.sdk.messages import LoadRequest

AUTO = -1
HOST_SHARE = 0.5  # of the RAM that is free, where the driver may choose
MEMINFO = Path("/proc/meminfo")


def with_tiers(request: LoadRequest, page_bytes: int, *, no_host: bool) -> LoadRequest:
    """The request with its ``host_bytes`` and ``disk_bytes`` as pages.

    ``page_bytes`` are those of a page of every replica. Left to the driver, host memory takes half of what is
    free, and nothing with ``no_host``: where the device's own memory is RAM, or pages cannot be moved.
    """
    host = request.host_bytes
    if host == AUTO:
        host = 0 if no_host else int(HOST_SHARE * free_ram())
    return msgspec.structs.replace(
        request,
        host_pages=request.host_pages or host // page_bytes,
        disk_pages=request.disk_pages or request.disk_bytes // page_bytes,
    )


def free_ram() -> int:
    """Bytes of RAM that could be had without swapping; 0 where the system does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0

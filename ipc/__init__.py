"""What every process shares: wire format, errors, sockets and keys, the service loop, the clients.

header.py   frame 0 of every message; codec.py the bodies; limits.py every bound on what a socket may carry
errors.py   the typed errors
grant.py    what a capability allows, and the origin the kernel stamps on each call
sockets.py  where the sockets are and how they are opened
calls.py    calls this process made and has no answer to yet (no I/O)
server.py   the service loop: get, switch, reply
client.py   the synchronous client; aio.py the same for asyncio
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.ipc.aio import AsyncClient
    from llmos.ipc.client import Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a service needs neither client, and start-up time is counted.
    if name == "Client":
        from llmos.ipc.client import Client

        return Client
    if name == "AsyncClient":
        from llmos.ipc.aio import AsyncClient

        return AsyncClient
    raise AttributeError(name)

"""The gateway process: uvicorn on uvloop, registered with the kernel."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from pathlib import Path

import uvicorn

from llmos.ipc import paths
from llmos.ipc.aio import AsyncClient
from llmos.ipc.errors import InvalidArgument, IOFailure
from llmos.services import manifest
from llmos.services.gateway.app import Gateway
from llmos.services.gateway.registration import Registration

NAME = "gateway"
URL_FILE = "gateway.url"
CALL_SECONDS = 30.0
STOP_SECONDS = 3
BACKLOG = 1024
log = logging.getLogger("llmos.gateway")


class _HttpServer(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, registration: Registration) -> None:
        super().__init__(config)
        self._registration = registration

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._registration.start()


def bind(host: str, port: int) -> socket.socket:
    """A listening address; InvalidArgument for one that means every interface, IOFailure if it is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidArgument(f"gateway.host {host!r} is no address: {error.strerror}") from None
    if host in ("", "*") or ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified:
        raise InvalidArgument(f"gateway.host {host!r} means every interface: name one address")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise IOFailure(
            f"cannot listen on {host}:{port} ({error.strerror}): set gateway.port in the manifest, 0 for any"
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(run: Path) -> None:
    """Serve until told to stop, by the kernel or by a signal."""
    spec = manifest.read_running(run).gateway
    token = paths.read_token(NAME, run)
    listener = bind(spec.host, spec.port)
    async with AsyncClient(token, run=run, timeout=CALL_SECONDS) as client:
        gateway = Gateway(client, spec.max_body)

        def stop() -> None:
            server.should_exit = True

        registration = Registration(token, client, run, on_stop=stop, progress=lambda: gateway.progress)
        config = uvicorn.Config(
            gateway.app(),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            limit_concurrency=spec.max_connections,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        server = _HttpServer(config, registration)
        paths.write_private(run / URL_FILE, url(listener).encode())
        log.info("listening on %s", url(listener))
        try:
            await server.serve([listener])
        finally:
            (run / URL_FILE).unlink(missing_ok=True)
            await registration.close()


def main() -> None:
    """Run the process."""
    import uvloop

    # uvicorn handles the signals, and raises them once more at its end: then there is nothing left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(paths.run_dir()))

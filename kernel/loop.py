"""The sockets and the poll loop: one ROUTER on ipc for data, one for control, optionally one on tcp.

A peer's routing id is never taken for its identity: the ids are made by our own sockets (a peer that brings
its own is not served), so each names one connection for as long as it lasts; on ipc the process behind it is
known by its socket credentials and watched by pidfd, on tcp it is the CURVE key that ZAP admitted.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.utils import z85

from llmos.ipc import limits, paths, sockets
from llmos.ipc.sockets import Wire
from llmos.kernel.dispatcher import Dispatcher, Sent
from llmos.kernel.messages import BootFile, Tcp
from llmos.kernel.methods import Methods
from llmos.kernel.table import Connection, Lane, Table
from llmos.kernel.verbs import Verbs

BATCH = 256
TICK_MS = 50
AUTO_ID = 0  # the first byte of a routing id made by libzmq; a peer cannot choose one that starts with it


class KernelLoop:
    """Reads messages, hands them to the dispatcher, and sends what it says."""

    def __init__(self, run: Path, boot: BootFile) -> None:
        boot_id = secrets.token_hex(8)
        names = ["security", *(e.grant.serves for e in boot.entries if e.grant.serves)]
        self.table = Table(list(dict.fromkeys(names)))
        self.dispatcher = Dispatcher(self.table, self._send)
        self.verbs = Verbs(self.table, self.dispatcher, boot, boot_id)
        self.methods = Methods(self.table, self.dispatcher, self.verbs, boot_id, _now())
        self._context = zmq.Context()
        self._sockets = {lane: self._bind(paths.socket_address(name, run)) for lane, name in LANES.items()}
        self._authorized = Path(boot.tcp.authorized) if boot.tcp else None
        self._zap = self._bind_tcp(boot.tcp) if boot.tcp else None
        self._wires = {lane: Wire(socket) for lane, socket in self._sockets.items()}
        self._deaths = select.epoll()
        self._processes: dict[int, int] = {}
        self._running = True

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        poller = zmq.Poller()
        for socket in (*self._sockets.values(), *([self._zap] if self._zap else [])):
            poller.register(socket, zmq.POLLIN)
        poller.register(self._deaths.fileno(), zmq.POLLIN)
        next_tick = 0.0
        while self._running:
            ready = dict(poller.poll(TICK_MS))
            if self._zap is not None and self._zap in ready:
                self._authenticate(self._zap)
            if self._deaths.fileno() in ready:
                self._bury()
            # Control first: a registration or a stop never waits for the data behind it.
            for lane in (Lane.CONTROL, Lane.DATA, Lane.TCP):
                if lane in self._sockets and self._sockets[lane] in ready:
                    self._drain(lane)
            if time.monotonic() >= next_tick:
                self.dispatcher.tick(_now())
                next_tick = time.monotonic() + TICK_MS / 1000
        self.close()

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        self._deaths.close()
        self._context.destroy(linger=0)

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        socket = self._router()
        previous = os.umask(0o177)
        try:
            socket.bind(address)
        finally:
            os.umask(previous)
        return socket

    def _router(self) -> zmq.Socket[bytes]:
        socket = sockets.configure(self._context.socket(zmq.ROUTER))
        socket.set(zmq.ROUTER_MANDATORY, 1)
        return socket

    def _bind_tcp(self, tcp: Tcp) -> zmq.Socket[bytes]:
        """Listen on tcp with CURVE; the returned ZAP socket must answer before any peer is admitted."""
        sockets.check_address(tcp.address)
        zap = self._context.socket(zmq.REP)
        zap.bind("inproc://zeromq.zap.01")
        socket = self._router()
        socket.curve_server = True
        socket.curve_secretkey = tcp.secret.encode()
        socket.set(zmq.ZAP_DOMAIN, b"llmos")
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.set(zmq.HEARTBEAT_IVL, 5000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 15000)
        socket.bind(tcp.address)
        self._sockets[Lane.TCP] = socket
        return zap

    def _authenticate(self, zap: zmq.Socket[bytes]) -> None:
        """Answer one ZAP request (RFC 27): admit a CURVE key whose file is in the authorized folder."""
        version, request, _domain, _address, _identity, mechanism, *credentials = zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        files = self._authorized.glob("*.pub") if self._authorized else ()
        known = {path.read_bytes().strip() for path in files}
        status = (b"200", b"OK", key) if key and key in known else (b"400", b"unknown key", b"")
        zap.send_multipart([version, request, *status, b""])

    def _drain(self, lane: Lane) -> None:
        now, connections, dispatch = _now(), self.table.connections, self.dispatcher.dispatch
        for rid, *message in self._wires[lane].drain(BATCH):
            sender = connections.get((lane, rid.bytes)) or self._admit(lane, rid.bytes, message)
            if sender is not None:
                # Too many frames is as bad as none, and answered in the same way; the origin needs one.
                few = len(message) < limits.FRAMES
                dispatch(sender, [frame.bytes for frame in message] if few else [], now)

    def _admit(self, lane: Lane, rid: bytes, message: list[zmq.Frame]) -> Connection | None:
        """Enter a peer with its first message, whose metadata says who it is."""
        if rid[0] != AUTO_ID or not message or len(self.table.connections) >= limits.CONNECTIONS:
            return None
        peer, pid = _identify(message[0], lane)
        connection = self.table.open(lane, rid, pid, peer, _now())
        if pid:
            self._watch(connection)
        return connection

    def _watch(self, connection: Connection) -> None:
        """Learn of the death of the process behind an ipc connection as it happens."""
        if connection.pid not in self._processes:
            try:
                descriptor = os.pidfd_open(connection.pid)
            except ProcessLookupError:
                self.verbs.close(connection)
                return
            self._deaths.register(descriptor, select.EPOLLIN)
            self._processes[connection.pid] = descriptor

    def _bury(self) -> None:
        dead = {descriptor for descriptor, _ in self._deaths.poll(0)}
        for pid in [pid for pid, descriptor in self._processes.items() if descriptor in dead]:
            self._deaths.unregister(self._processes[pid])
            os.close(self._processes.pop(pid))
            for connection in [c for c in self.table.connections.values() if c.pid == pid]:
                self.verbs.close(connection)

    def _send(self, to: Connection, frames: list[bytes]) -> Sent:
        if to is self.verbs.own:
            self.verbs.on_verified(frames)
            return Sent.OK
        try:
            self._wires[to.lane].send([to.rid, *frames])
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.GONE
        return Sent.OK


LANES = {Lane.CONTROL: "control", Lane.DATA: "kernel"}


def _identify(frame: zmq.Frame, lane: Lane) -> tuple[str, int]:
    """Who is behind a connection: on ipc "uid:gid:pid" of the process, on tcp its admitted CURVE key."""
    with suppress(zmq.ZMQError):
        if lane is Lane.TCP:
            return f"key:{frame.get('User-Id')}", 0
        address = str(frame.get("Peer-Address"))
        return address, int(address.rsplit(":", 1)[1])
    return "", 0


def _now() -> int:
    return time.time_ns() // 1000

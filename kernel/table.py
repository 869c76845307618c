"""What the kernel knows: connections, the grants they hold, calls outstanding, names."""

from __future__ import annotations

import secrets
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

from llmos.ipc import codec, limits
from llmos.ipc.errors import Busy
from llmos.ipc.grant import ANY, Grant, Origin
from llmos.kernel.messages import Hop

TRACE_HOPS = 65536


class Lane(Enum):
    """The socket a connection came in by."""

    DATA = "data"
    CONTROL = "control"
    TCP = "tcp"


class Held:
    """A grant in a connection's table, with what the fast path needs worked out beforehand."""

    __slots__ = ("_allowed", "expires", "grant", "origin")

    def __init__(self, connection: int, grant: Grant) -> None:
        self.grant = grant
        self.expires = grant.expires
        self.origin = codec.encode(Origin(connection, grant))
        self._allowed = frozenset(tuple(call.rsplit(".", 1)) for call in grant.calls)

    def allows(self, service: str, method: str, now: int) -> bool:
        """Whether this grant allows a method now (microseconds since the Unix epoch)."""
        allowed = (service, method) in self._allowed or (service, ANY) in self._allowed
        return allowed and not 0 < self.expires <= now


class Call:
    """A call that its server has not answered yet."""

    __slots__ = ("caller", "deadline", "held", "id", "method", "server", "service")

    def __init__(self, caller: Connection, id: int, server: Connection, held: Held, deadline: int) -> None:
        self.caller = caller
        self.id = id
        self.server = server
        self.held = held
        self.deadline = deadline


@dataclass(eq=False, slots=True)
class Connection:
    """One authenticated peer; its routing id was made by our own socket, so it names this connection only."""

    rid: bytes
    lane: Lane
    number: int
    pid: int
    peer: str
    handles: dict[int, Held]
    opened: int
    # Not from 1: a number that an earlier kernel gave out must not name another capability here.
    next_handle: int = field(default_factory=lambda: secrets.randbelow(1 << 30) + 1)
    calls: dict[int, Call] = field(default_factory=dict)
    serving: dict[tuple[int, int], Call] = field(default_factory=dict)
    unsent: deque[list[bytes]] = field(default_factory=deque)
    service: str = ""
    greeting: bool = False

    @property
    def principal(self) -> str:
        return self.handles[0].grant.principal if 0 in self.handles else self.peer


@dataclass(slots=True)
class Service:
    """A name that may be served: by ``data`` when it is up, and reached urgently by ``control``."""

    name: str
    data: Connection | None = None
    control: Connection | None = None
    ready: bool = False
    beat_time: int = 0
    progress: int = 0
    limit: float = 15.0


class Table:
    """All state of the kernel; changed by the dispatcher and the verbs only."""

    def __init__(self, names: list[str]) -> None:
        self.connections: dict[tuple[Lane, bytes], Connection] = {}
        self.services: dict[str, Service] = {name: Service(name) for name in names}
        self.watchers: set[int] = set()
        self.messages: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.hops: deque[Hop] = deque(maxlen=TRACE_HOPS)
        self._number = 0

    def open(self, lane: Lane, rid: bytes, pid: int, peer: str, now: int = 0) -> Connection:
        """Enter a peer that sent its first message; it holds no grant yet."""
        if len(self.connections) >= limits.CONNECTIONS:
            raise Busy(f"the kernel serves {limits.CONNECTIONS} connections already")
        self._number += 1
        connection = Connection(rid, lane, self._number, pid, peer, {}, now)
        self.connections[lane, rid] = connection
        return connection

    def grant(self, connection: Connection, handle: int, grant: Grant) -> Held:
        """Put a grant in a connection's table under a handle."""
        held = connection.handles[handle] = Held(connection.number, grant)
        return held

    def end(self, call: Call) -> None:
        """Forget a call: it was answered, or never will be."""
        call.caller.calls.pop(call.id, None)
        call.server.serving.pop((call.caller.number, call.id), None)

"""The bodies of the kernel's verbs (kind "kernel") and of its methods as the service ``kernel``."""

from __future__ import annotations

import msgspec

from llmos.ipc.grant import Grant


class Hello(msgspec.Struct, frozen=True):
    """First message on a connection; ``control`` marks a service's second one, on the control socket."""

    token: str
    control: bool = False


class Welcome(msgspec.Struct, frozen=True):
    """``connection`` is this connection's number; ``boot`` changes with every start of the kernel."""

    connection: int
    boot: str
    grant: Grant


class Present(msgspec.Struct, frozen=True):
    """Exchange a token for a handle on this connection."""

    token: str


class Presented(msgspec.Struct, frozen=True):
    handle: int
    grant: Grant


class Release(msgspec.Struct, frozen=True):
    handle: int


class Beat(msgspec.Struct, frozen=True):
    """Sent twice a second on the control socket. ``progress`` grows with the work done; ``limit`` is how many
    seconds may pass before the next beat: more before a long piece of work, such as loading a model."""

    progress: int
    limit: float = 15.0


class Event(msgspec.Struct, frozen=True):
    """A service came up or went down; sent on the control socket to those who watch."""

    name: str
    connection: int


class Name(msgspec.Struct, frozen=True):
    """A line of the name table. ``beat_age`` is the time in seconds since the last beat, -1 before the first;
    beyond ``limit`` the service is stuck."""

    name: str
    connection: int
    pid: int
    ready: bool
    outstanding: int
    beat_age: float
    progress: int
    limit: float


class Names(msgspec.Struct, frozen=True):
    names: list[Name]


class Stats(msgspec.Struct, frozen=True):
    """Counters since the kernel started."""

    boot: str
    uptime: float
    connections: int
    grants: int
    outstanding: int
    messages: dict[str, int]
    errors: dict[str, int]


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """One message of a trace as it passed the kernel; ``time`` in microseconds since the Unix epoch."""

    time: int
    trace: int
    kind: str
    sender: str
    peer: str
    method: str
    id: int


class TraceQuery(msgspec.Struct, frozen=True):
    """``trace`` 0 asks for the hops of all traces."""

    trace: int = 0
    limit: int = 1000


class Hops(msgspec.Struct, frozen=True):
    hops: list[Hop]


class Revoke(msgspec.Struct, frozen=True):
    """Remove every grant whose chain holds one of these revocation ids."""

    ids: list[str]


class Revoked(msgspec.Struct, frozen=True):
    grants: int
    calls: int


class Stop(msgspec.Struct, frozen=True):
    """Ask a service to finish and leave."""

    name: str


class Verify(msgspec.Struct, frozen=True):
    """What the kernel asks of security: is this token good, and what does it allow?"""

    token: str


class Verified(msgspec.Struct, frozen=True):
    grant: Grant


class BootEntry(msgspec.Struct, frozen=True):
    """A boot token's SHA-256 in hexadecimal, and what its bearer may do."""

    digest: str
    grant: Grant


class Tcp(msgspec.Struct, frozen=True):
    """Where to listen for peers on other hosts, our CURVE keys (Z85), and the folder of the public keys of
    those we admit: files that end in ``.pub``."""

    address: str
    public: str
    secret: str
    authorized: str


class BootFile(msgspec.Struct, frozen=True):
    """What the supervisor hands the kernel: the grants of the processes it starts. Nobody else has any."""

    entries: list[BootEntry]
    tcp: Tcp | None = None

"""What the kernel answers as the service ``kernel``: stats, names, trace, revoke, stop."""

from __future__ import annotations

from llmos.ipc import codec
from llmos.ipc.errors import AccessDenied, InvalidArgument, LLMOSError, NotFound, NotSupported
from llmos.ipc.header import Header
from llmos.kernel.dispatcher import Dispatcher
from llmos.kernel.messages import Hops, Name, Names, Revoke, Revoked, Stats, Stop, TraceQuery
from llmos.kernel.table import Connection, Service, Table
from llmos.kernel.verbs import Verbs


class Methods:
    """Each method takes the caller's body and returns the reply's."""

    def __init__(self, table: Table, dispatcher: Dispatcher, verbs: Verbs, boot: str, started: int) -> None:
        self._table = table
        self._dispatcher = dispatcher
        self._verbs = verbs
        self._boot = boot
        self._started = started
        dispatcher.on_method = self.on_method

    def on_method(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        """Answer one call; the capability was checked by the dispatcher."""
        method = getattr(self, f"_{head.method}", None) if head.method in METHODS else None
        try:
            if method is None:
                raise NotSupported(f"the kernel has no method {head.method!r}")
            self._dispatcher.reply(sender, head, method(body, now))
        except LLMOSError as error:
            self._dispatcher.refuse(sender, head, error)

    def _stats(self, body: bytes, now: int) -> Stats:
        connections = self._table.connections.values()
        held, outstanding = sum(len(c.handles) for c in connections), sum(len(c.calls) for c in connections)
        uptime, counted = (now - self._started) / 1e6, (dict(self._table.messages), dict(self._table.errors))
        return Stats(self._boot, uptime, len(connections), held, outstanding, *counted)

    def _names(self, body: bytes, now: int) -> Names:
        return Names([_line(service, now) for service in self._table.services.values()])

    def _trace(self, body: bytes, now: int) -> Hops:
        query = codec.decode(body, TraceQuery)
        if not 0 < query.limit <= 10_000:
            raise InvalidArgument(f"limit must be 1 to 10000, not {query.limit}")
        hops = [hop for hop in self._table.hops if query.trace in (0, hop.trace)]
        return Hops(hops[-query.limit :])

    def _revoke(self, body: bytes, now: int) -> Revoked:
        ids = set(codec.decode(body, Revoke).ids)
        grants = calls = 0
        for connection in list(self._table.connections.values()):
            # Calls first: one may be acting under this grant from another service's connection.
            for call in list(connection.calls.values()):
                if ids.intersection(call.held.grant.chain):
                    self._dispatcher.abandon(call, AccessDenied("the capability was revoked"))
                    calls += 1
            for handle, held in list(connection.handles.items()):
                if ids.intersection(held.grant.chain):
                    del connection.handles[handle]
                    grants += 1
        return Revoked(grants, calls)

    def _stop(self, body: bytes, now: int) -> None:
        stop = codec.decode(body, Stop)
        service = self._table.services.get(stop.name)
        if service is None:
            raise NotFound(f"there is no service {stop.name!r}")
        self._verbs.stop(service)


def _line(service: Service, now: int) -> Name:
    data = service.data
    number, pid, outstanding = (data.number, data.pid, len(data.serving)) if data else (0, 0, 0)
    age = (now - service.beat_time) / 1e6 if service.beat_time else -1.0
    seen = (service.ready, outstanding, age, service.progress, service.limit)
    return Name(service.name, number, pid, *seen)


METHODS = frozenset(("stats", "names", "trace", "revoke", "stop"))

"""One message in, the messages out. No I/O: the loop hands in frames and a function that sends.

The fast path (``on_call``, ``on_answer``) tests for the common case with table look-ups and forwards the
header as it came; a body is never decoded. What is left over is refused by a typed error.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from llmos.ipc import codec, header, limits
from llmos.ipc.errors import AccessDenied, Busy, HostDown, LLMOSError, NotFound, ProtocolError, TimedOut
from llmos.ipc.header import VERSION, Header, Kind
from llmos.kernel.messages import Hop
from llmos.kernel.table import Call, Connection, Held, Table

# Plain integers: comparing with an enum's members costs more than the look-ups of the fast path.
CALL, CAST, CHUNK, CANCEL, KERNEL = map(int, (Kind.CALL, Kind.CAST, Kind.CHUNK, Kind.CANCEL, Kind.KERNEL))
ANSWERS = frozenset(map(int, (Kind.REPLY, Kind.CHUNK, Kind.END, Kind.ERROR)))
GREETING_MICROS = 30_000_000  # how long a peer may take to say a hello that is accepted


class Sent(Enum):
    OK = "ok"
    FULL = "full"
    GONE = "gone"


Send = Callable[[Connection, list[bytes]], Sent]
KernelHandler = Callable[[Connection, Header, bytes, int], None]


class Dispatcher:
    """Routes messages between connections; ``send`` never waits."""

    def __init__(self, table: Table, send: Send) -> None:
        self.table = table
        self._send = send
        self.on_verb: KernelHandler | None = None
        self.on_method: KernelHandler | None = None
        self.on_gone: Callable[[Connection], None] = self.close

    def dispatch(self, sender: Connection, frames: list[bytes], now: int) -> None:
        """Route one message of an authenticated connection; ``now`` in microseconds since the Unix epoch."""
        try:
            if len(frames) < 2:
                raise ProtocolError("a message has a header and a body")
            head = header.decode(frames[0])
        except ProtocolError as error:
            self.table.errors[error.code] += 1
            self.send(sender, [self._error_header(0, 0), codec.encode_error(error)])
            return
        kind = head.kind
        if kind == CALL:
            self._on_call(sender, head, frames, now)
        elif kind in ANSWERS:
            self._on_answer(sender, head, frames, now)
        elif kind == CAST:
            self._on_cast(sender, head, frames, now)
        elif kind == CANCEL:
            self._on_cancel(sender, head, frames)
        elif kind == KERNEL and self.on_verb is not None:
            self.on_verb(sender, head, frames[1], now)
        else:
            self.refuse(sender, head, ProtocolError(f"unknown message kind {kind}"))

    def _on_call(self, sender: Connection, head: Header, frames: list[bytes], now: int) -> None:
        try:
            held = self._held(sender, head, now)
            if head.peer == "kernel" and self.on_method is not None:
                self.on_method(sender, head, frames[1], now)
                return
            server = self._server(head)
            if head.id in sender.calls:
                raise ProtocolError(f"message id {head.id} is in use by an outstanding call")
            if len(sender.calls) >= limits.CALLS_PER_CONNECTION:
                raise Busy(f"{len(sender.calls)} calls of this connection are outstanding")
            if len(server.serving) >= limits.CALLS_PER_SERVICE:
                raise Busy(f"{head.peer} has {len(server.serving)} calls to answer")
            if self.send(server, [*frames, held.origin]) is not Sent.OK:
                raise Busy(f"the queue of {head.peer} is full")
        except LLMOSError as error:
            self.refuse(sender, head, error)
            return
        call = Call(sender, head.id, server, held, head.deadline)
        sender.calls[head.id] = server.serving[sender.number, head.id] = call
        self.table.messages["call"] += 1
        if head.trace:
            self.trace(sender, head, now)

    def _on_cast(self, sender: Connection, head: Header, frames: list[bytes], now: int) -> None:
        try:
            held = self._held(sender, head, now)
            if self.send(self._server(head), [*frames, held.origin]) is not Sent.OK:
                raise Busy(f"the queue of {head.peer} is full")
        except LLMOSError as error:
            self.table.errors[error.code] += 1
        else:
            self.table.messages["cast"] += 1

    def _held(self, sender: Connection, head: Header, now: int) -> Held:
        """The grant a call is made under; AccessDenied if it does not allow the method."""
        own = sender.handles.get(head.handle)
        if own is None:
            said_hello = 0 in sender.handles
            raise AccessDenied(f"this connection holds no capability {head.handle}", delivered=said_hello)
        if not own.allows(head.peer, head.method, now):  # type: ignore[arg-type]
            raise AccessDenied(f"this capability does not allow {head.peer}.{head.method}")
        if head.acting is None:
            return own
        served = sender.serving.get(head.acting)
        if served is None:
            raise AccessDenied("cannot act for a call that is not being served here")
        return Held(sender.number, served.held.grant)

    def _server(self, head: Header) -> Connection:
        service = self.table.services.get(head.peer)  # type: ignore[arg-type]
        if service is None:
            raise NotFound(f"there is no service {head.peer!r}")
        if service.data is None:
            raise HostDown(f"{service.name} is not running", delivered=False)
        return service.data

    def _on_answer(self, sender: Connection, head: Header, frames: list[bytes], now: int) -> None:
        call = sender.serving.get((head.peer, head.id))  # type: ignore[arg-type]
        if call is None:
            self.table.messages["late"] += 1
            return
        final = head.kind != CHUNK
        if final:
            self.table.end(call)
        sent = self.send(call.caller, frames)
        if sent is Sent.FULL and final:
            call.caller.unsent.append(frames)
        elif sent is Sent.FULL:
            self.abandon(call, Busy("the caller does not read its stream"))
        self.table.messages["answer"] += 1
        if head.trace and final:
            self.trace(sender, head, now)

    def _on_cancel(self, sender: Connection, head: Header, frames: list[bytes]) -> None:
        call = sender.calls.get(head.id)
        if call is not None:
            self.send(call.server, [*frames, call.held.origin])
            self.table.messages["cancel"] += 1

    def send(self, to: Connection, frames: list[bytes]) -> Sent:
        """Send, and close the connection if its peer is gone."""
        sent = self._send(to, frames)
        if sent is Sent.GONE:
            self.on_gone(to)
        return sent

    def refuse(self, sender: Connection, head: Header, error: LLMOSError) -> None:
        """Answer a message with an error."""
        self.table.errors[error.code] += 1
        frames = [self._error_header(sender.number, head.id, head.trace), codec.encode_error(error)]
        if self.send(sender, frames) is Sent.FULL:
            sender.unsent.append(frames)

    def reply(self, to: Connection, head: Header, body: object) -> None:
        """Answer a verb or a method of the kernel itself."""
        frames = [header.encode(Header(VERSION, Kind.REPLY, to.number, "", head.id)), codec.encode(body)]
        if self.send(to, frames) is Sent.FULL:
            to.unsent.append(frames)

    def abandon(self, call: Call, error: LLMOSError) -> None:
        """End a call with an error on behalf of its server, and tell the server."""
        self.table.end(call)
        self.table.errors[error.code] += 1
        frames = [self._error_header(call.caller.number, call.id), codec.encode_error(error)]
        if self.send(call.caller, frames) is Sent.FULL:
            call.caller.unsent.append(frames)
        cancel = header.encode(Header(VERSION, Kind.CANCEL, call.server.service, "", call.id))
        self.send(call.server, [cancel, codec.EMPTY, call.held.origin])

    def tick(self, now: int) -> None:
        """Deliver what a full queue held up, and end the calls whose deadline has passed."""
        for connection in list(self.table.connections.values()):
            if 0 not in connection.handles and connection.opened + GREETING_MICROS < now:
                self.on_gone(connection)
                continue
            while connection.unsent and self.send(connection, connection.unsent[0]) is Sent.OK:
                connection.unsent.popleft()
            for call in [c for c in connection.calls.values() if 0 < c.deadline <= now]:
                self.abandon(call, TimedOut(f"{call.server.service} did not answer before the deadline"))

    def close(self, gone: Connection) -> None:
        """Forget a connection: its callers get EHOSTDOWN, its own calls are cancelled, its grants vanish."""
        if self.table.connections.pop((gone.lane, gone.rid), None) is None:
            return
        gone.handles.clear()
        gone.unsent.clear()
        for call in list(gone.serving.values()):
            self.table.end(call)
            head = Header(VERSION, Kind.CALL, gone.service, "", call.id)
            self.refuse(
                call.caller, head, HostDown(f"{gone.service} died before it answered", delivered=True)
            )
        for call in list(gone.calls.values()):
            self.table.end(call)
            cancel = header.encode(Header(VERSION, Kind.CANCEL, call.server.service, "", call.id))
            self.send(call.server, [cancel, codec.EMPTY, call.held.origin])
        self.table.watchers.discard(gone.number)

    def trace(self, sender: Connection, head: Header, now: int) -> None:
        """Note one hop of a traced call."""
        kind = Kind(head.kind).name.lower()
        self.table.hops.append(
            Hop(now, head.trace, kind, sender.principal, str(head.peer), head.method, head.id)
        )

    @staticmethod
    def _error_header(to: int, id: int, trace: int = 0) -> bytes:
        return header.encode(Header(VERSION, Kind.ERROR, to, "", id, 0, trace))

"""How a connection gets its rights and its name: hello, present, release, ready, watch, beat, bye."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from llmos.ipc import codec, header, limits
from llmos.ipc.errors import AccessDenied, Busy, HostDown, InvalidArgument, LLMOSError, ProtocolError
from llmos.ipc.grant import Grant, Origin
from llmos.ipc.header import VERSION, Header, Kind
from llmos.kernel import messages
from llmos.kernel.dispatcher import Dispatcher, Sent
from llmos.kernel.table import Call, Connection, Held, Lane, Service, Table

Granted = Callable[[Grant], None]
KERNEL_GRANT = Grant(principal="kernel", tenant="system", calls=["security.verify"])


class Verbs:
    """The slow path: each verb is checked completely before it has any effect."""

    def __init__(self, table: Table, dispatcher: Dispatcher, boot: messages.BootFile, boot_id: str) -> None:
        self._table = table
        self._dispatcher = dispatcher
        self._boot = {entry.digest: entry.grant for entry in boot.entries}
        self._boot_id = boot_id
        self._verifying: dict[int, tuple[Connection, Header, Granted]] = {}
        self._next_id = 0
        # The kernel's own seat in the table: the caller of security.verify, with connection number 0.
        self.own = Connection(b"", Lane.CONTROL, 0, 0, "kernel", {0: Held(0, KERNEL_GRANT)}, 0)
        table.connections[Lane.CONTROL, b""] = self.own
        dispatcher.on_verb = self.on_verb
        dispatcher.on_gone = self.close

    def on_verb(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        """Carry out one verb, or refuse it."""
        verb = getattr(self, f"_{head.method}", None) if head.method in VERBS else None
        try:
            if verb is None:
                raise ProtocolError(f"the kernel has no verb {head.method!r}")
            if head.method != "hello" and 0 not in sender.handles:
                raise AccessDenied("say hello first")
            verb(sender, head, body, now)
        except LLMOSError as error:
            self._dispatcher.refuse(sender, head, error)

    def _hello(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        hello = codec.decode(body, messages.Hello)
        if sender.greeting or 0 in sender.handles:
            raise ProtocolError("this connection has said hello already")
        if hello.control != (sender.lane is Lane.CONTROL):
            raise ProtocolError("a control connection, and no other, uses the control socket")

        def welcome(grant: Grant) -> None:
            sender.greeting = False
            self._table.grant(sender, 0, grant)
            if grant.serves:
                self._register(sender, grant.serves, hello.control)
            self._dispatcher.reply(sender, head, messages.Welcome(sender.number, self._boot_id, grant))

        sender.greeting = True
        try:
            self._verify(sender, head, hello.token, now, welcome)
        except LLMOSError:
            sender.greeting = False
            raise

    def _present(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        present = codec.decode(body, messages.Present)
        if len(sender.handles) >= limits.HANDLES_PER_CONNECTION:
            raise Busy(f"this connection holds {len(sender.handles)} capabilities: release some")

        def enter(grant: Grant) -> None:
            handle = sender.next_handle
            sender.next_handle += 1
            self._table.grant(sender, handle, grant)
            self._dispatcher.reply(sender, head, messages.Presented(handle, grant))

        self._verify(sender, head, present.token, now, enter)

    def _release(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        handle = codec.decode(body, messages.Release).handle
        if handle == 0 or sender.handles.pop(handle, None) is None:
            raise InvalidArgument(f"handle {handle} cannot be released")
        self._dispatcher.reply(sender, head, None)

    def _ready(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        service = self._service_of(sender)
        service.ready = True
        service.beat_time = now
        self._dispatcher.reply(sender, head, None)

    def _watch(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        self._service_of(sender)
        self._table.watchers.add(sender.number)
        self._dispatcher.reply(sender, head, None)
        for service in self._table.services.values():
            if service.data is not None:
                self._tell(sender, "up", service.data)

    def _beat(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        beat, service = codec.decode(body, messages.Beat), self._service_of(sender)
        service.beat_time = now
        service.progress, service.limit = beat.progress, beat.limit

    def _bye(self, sender: Connection, head: Header, body: bytes, now: int) -> None:
        self.close(sender)

    def _service_of(self, sender: Connection) -> Service:
        service = self._table.services.get(sender.handles[0].grant.serves)
        if service is None or service.control is not sender:
            raise AccessDenied("only a service may do this, on its control connection")
        return service

    def _register(self, connection: Connection, name: str, control: bool) -> None:
        """Give a connection its name; a process that was started anew takes it over from its predecessor."""
        service = self._table.services.setdefault(name, Service(name))
        connection.service = name
        if control:
            if service.control is not None:
                self.close(service.control)
            service.control = connection
        else:
            if service.data is not None:
                self.close(service.data)
            service.data = connection
            self._announce("up", connection)

    def _announce(self, what: str, connection: Connection) -> None:
        for watcher in list(self._table.connections.values()):
            if watcher.number in self._table.watchers:
                self._tell(watcher, what, connection)

    def _tell(self, watcher: Connection, what: str, about: Connection) -> None:
        head = header.encode(Header(VERSION, Kind.KERNEL, watcher.number, what, 0))
        self._dispatcher.send(watcher, [head, codec.encode(messages.Event(about.service, about.number))])

    def stop(self, service: Service) -> None:
        """Ask a service to leave, on its control connection."""
        if service.control is None:
            raise HostDown(f"{service.name} is not running")
        head = header.encode(Header(VERSION, Kind.KERNEL, service.control.number, "stop", 0))
        self._dispatcher.send(service.control, [head, codec.EMPTY])

    def close(self, gone: Connection) -> None:
        """Forget a connection, and its service's name with it."""
        if (gone.lane, gone.rid) not in self._table.connections:
            return
        service = self._table.services.get(gone.service)
        was_data = service is not None and service.data is gone
        if service is not None and was_data:
            service.data, service.ready = None, False
        if service is not None and service.control is gone:
            service.control = None
        self._dispatcher.close(gone)
        if was_data:
            self._announce("down", gone)

    def _verify(self, sender: Connection, head: Header, token: str, now: int, granted: Granted) -> None:
        """Continue with the grant of a token: a boot token's from our file, any other's from security."""
        if len(token) > limits.TOKEN_BYTES:
            raise InvalidArgument(f"a token of {len(token)} characters exceeds {limits.TOKEN_BYTES}")
        own = self._boot.get(hashlib.sha256(token.encode()).hexdigest())
        if own is not None:
            granted(own)
            return
        security = self._table.services["security"].data
        if security is None:
            raise HostDown("security is not running, so no token can be verified", delivered=False)
        self._next_id += 1
        call = Call(self.own, self._next_id, security, self.own.handles[0], head.deadline)
        frames = [
            header.encode(Header(VERSION, Kind.CALL, "security", "verify", call.id, 0, 0, head.deadline)),
            codec.encode(messages.Verify(token)),
            codec.encode(Origin(0, KERNEL_GRANT)),
        ]
        if self._dispatcher.send(security, frames) is not Sent.OK:
            raise Busy("the queue of security is full")
        self.own.calls[call.id] = security.serving[0, call.id] = call
        self._verifying[call.id] = (sender, head, granted)

    def on_verified(self, frames: list[bytes]) -> None:
        """Take security's answer to a question of ours."""
        answer = header.decode(frames[0])
        sender, head, granted = self._verifying.pop(answer.id)
        if (sender.lane, sender.rid) not in self._table.connections:
            return
        try:
            if answer.kind != Kind.REPLY:
                raise codec.decode_error(frames[1])
            granted(codec.decode(frames[1], messages.Verified).grant)
        except LLMOSError as error:
            sender.greeting = False
            down = isinstance(error, HostDown)
            self._dispatcher.refuse(sender, head, HostDown(error.message, delivered=False) if down else error)


VERBS = frozenset(("hello", "present", "release", "ready", "watch", "beat", "bye"))

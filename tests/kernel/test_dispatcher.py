"""The dispatcher as a specification: what is forwarded, what is refused, and that every call ends once."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.ipc import codec, header
from llmos.ipc.errors import LLMOSError
from llmos.ipc.grant import Grant, decode_origin
from llmos.ipc.header import VERSION, Header, Kind
from llmos.kernel.dispatcher import Dispatcher, Sent
from llmos.kernel.messages import BootFile
from llmos.kernel.methods import Methods
from llmos.kernel.table import Connection, Lane, Table
from llmos.kernel.verbs import Verbs

NOW = 1_000_000


class Net:
    """A dispatcher with one service and two clients; what it sends is collected by connection."""

    def __init__(self) -> None:
        self.table = Table(["echo", "absent"])
        self.sent: dict[int, list[tuple[Header, list[bytes]]]] = defaultdict(list)
        self.answer = Sent.OK
        self.full: set[int] = set()
        self.dispatcher = Dispatcher(self.table, self._send)
        self.verbs = Verbs(self.table, self.dispatcher, BootFile([]), "boot")
        self.methods = Methods(self.table, self.dispatcher, self.verbs, "boot", 0)
        self.user = self.peer(
            Grant(principal="user", tenant="a", calls=["echo.say", "absent.*"], chain=["r1"])
        )
        self.other = self.peer(Grant(principal="other", tenant="b", calls=[]))
        self.echo = self.peer(Grant(principal="echo", tenant="system", serves="echo", calls=["echo.say"]))
        self.table.services["echo"].data = self.echo
        self.echo.service = "echo"

    def peer(self, grant: Grant) -> Connection:
        connection = self.table.open(Lane.DATA, bytes([0, len(self.table.connections)]), 1, "peer")
        self.table.grant(connection, 0, grant)
        return connection

    def _send(self, to: Connection, frames: list[bytes]) -> Sent:
        if to.number in self.full:
            return Sent.FULL
        if self.answer is Sent.OK:
            self.sent[to.number].append((header.decode(frames[0]), frames))
        return self.answer

    def put(
        self, sender: Connection, kind: Kind, peer: str | int, method: str = "", id: int = 1, **more: object
    ) -> None:
        head = Header(VERSION, kind, peer, method, id, **more)  # type: ignore[arg-type]
        self.dispatcher.dispatch(sender, [header.encode(head), codec.EMPTY], NOW)

    def call(self, sender: Connection | None = None, **more: object) -> None:
        self.put(sender or self.user, Kind.CALL, "echo", "say", **more)  # type: ignore[arg-type]

    def errors(self, to: Connection) -> list[str]:
        errors = [codec.decode_error(f[1]) for h, f in self.sent[to.number] if h.kind == Kind.ERROR]
        return [error.code for error in errors if isinstance(error, LLMOSError)]


@pytest.fixture
def net() -> Net:
    return Net()


def test_a_call_is_forwarded_as_it_came_with_the_origin_behind_it(net: Net) -> None:
    net.call(id=7)
    head, frames = net.sent[net.echo.number][0]
    assert (head.method, head.id) == ("say", 7)
    origin = decode_origin(frames[-1])
    assert origin.connection == net.user.number
    assert origin.grant.tenant == "a"


def test_a_reply_reaches_the_caller_and_ends_the_call(net: Net) -> None:
    net.call(id=7)
    net.put(net.echo, Kind.REPLY, net.user.number, id=7)
    assert [h.kind for h, _ in net.sent[net.user.number]] == [Kind.REPLY]
    assert not net.user.calls
    assert not net.echo.serving


def test_chunks_pass_until_the_end(net: Net) -> None:
    net.call(id=7)
    for kind in (Kind.CHUNK, Kind.CHUNK, Kind.END, Kind.CHUNK):
        net.put(net.echo, kind, net.user.number, id=7)
    assert [h.kind for h, _ in net.sent[net.user.number]] == [Kind.CHUNK, Kind.CHUNK, Kind.END]


def test_an_answer_by_someone_who_was_not_asked_goes_nowhere(net: Net) -> None:
    net.call(id=7)
    net.put(net.other, Kind.REPLY, net.user.number, id=7)
    assert not net.sent[net.user.number]
    assert net.user.calls


@pytest.mark.parametrize(
    ("peer", "method", "handle", "code"),
    [
        ("echo", "shout", 0, "EACCES"),
        ("echo", "say", 9, "EACCES"),
        ("nobody", "say", 0, "EACCES"),
        ("absent", "say", 0, "EHOSTDOWN"),
        ("kernel", "stats", 0, "EACCES"),
    ],
)
def test_what_is_not_allowed_is_refused(net: Net, peer: str, method: str, handle: int, code: str) -> None:
    net.put(net.user, Kind.CALL, peer, method, handle=handle)
    assert net.errors(net.user) == [code]
    assert not net.sent[net.echo.number]


def test_an_expired_grant_allows_nothing(net: Net) -> None:
    late = net.peer(Grant(principal="late", tenant="a", calls=["echo.say"], expires=NOW))
    net.call(late)
    assert net.errors(late) == ["EACCES"]


def test_a_full_destination_answers_busy_at_once(net: Net) -> None:
    net.full.add(net.echo.number)
    net.call()
    assert net.errors(net.user) == ["EBUSY"]
    assert not net.user.calls


def test_an_answer_to_a_full_caller_is_delivered_later(net: Net) -> None:
    net.call(id=7)
    net.full.add(net.user.number)
    net.put(net.echo, Kind.REPLY, net.user.number, id=7)
    net.full.clear()
    net.dispatcher.tick(NOW)
    assert [h.kind for h, _ in net.sent[net.user.number]] == [Kind.REPLY]


def test_a_stream_that_nobody_reads_is_cancelled(net: Net) -> None:
    net.call(id=7)
    net.full.add(net.user.number)
    net.put(net.echo, Kind.CHUNK, net.user.number, id=7)
    net.full.clear()
    net.dispatcher.tick(NOW)
    assert net.errors(net.user) == ["EBUSY"]
    assert net.sent[net.echo.number][-1][0].kind == Kind.CANCEL


def test_the_deadline_ends_a_call_for_both_sides(net: Net) -> None:
    net.call(id=7, deadline=NOW + 10)
    net.dispatcher.tick(NOW + 9)
    assert not net.errors(net.user)
    net.dispatcher.tick(NOW + 10)
    assert net.errors(net.user) == ["ETIMEDOUT"]
    assert net.sent[net.echo.number][-1][0].kind == Kind.CANCEL


def test_the_calls_of_a_dead_service_end_with_ehostdown(net: Net) -> None:
    net.call(id=7)
    net.call(id=8)
    net.verbs.close(net.echo)
    assert net.errors(net.user) == ["EHOSTDOWN", "EHOSTDOWN"]
    net.call(id=9)
    assert net.errors(net.user)[2:] == ["EHOSTDOWN"]


def test_the_calls_of_a_dead_client_are_cancelled(net: Net) -> None:
    net.call(id=7)
    net.verbs.close(net.user)
    assert net.sent[net.echo.number][-1][0].kind == Kind.CANCEL
    assert not net.echo.serving


def test_a_message_id_cannot_be_used_twice_at_once(net: Net) -> None:
    net.call(id=7)
    net.call(id=7)
    assert net.errors(net.user) == ["EPROTO"]


def test_acting_for_a_caller_takes_the_callers_grant_and_ones_own_methods(net: Net) -> None:
    net.call(id=7)
    net.put(net.echo, Kind.CALL, "echo", "say", 1, acting=(net.user.number, 7))
    origin = decode_origin(net.sent[net.echo.number][-1][1][-1])
    assert origin.grant.tenant == "a"
    assert origin.connection == net.echo.number


def test_nobody_acts_for_a_call_that_is_not_theirs(net: Net) -> None:
    net.call(id=7)
    thief = net.peer(Grant(principal="thief", tenant="c", calls=["echo.say"]))
    net.put(thief, Kind.CALL, "echo", "say", 1, acting=(net.user.number, 7))
    assert net.errors(thief) == ["EACCES"]


def test_revocation_ends_what_runs_under_the_grant(net: Net) -> None:
    net.call(id=7)
    revoker = net.peer(Grant(principal="security", tenant="system", calls=["kernel.revoke"]))
    head = Header(VERSION, Kind.CALL, "kernel", "revoke", 1)
    net.dispatcher.dispatch(revoker, [header.encode(head), codec.encode({"ids": ["r1"]})], NOW)
    assert net.errors(net.user) == ["EACCES"]
    net.call(id=8)
    assert net.errors(net.user) == ["EACCES", "EACCES"]


def test_a_traced_call_leaves_its_hops(net: Net) -> None:
    net.call(id=7, trace=99)
    net.put(net.echo, Kind.REPLY, net.user.number, id=7, trace=99)
    assert [(hop.kind, hop.sender) for hop in net.table.hops] == [("call", "user"), ("reply", "echo")]


@given(st.lists(st.binary(max_size=80), max_size=4))
def test_no_bytes_at_all_disturb_the_dispatcher(frames: list[bytes]) -> None:
    net = Net()
    net.dispatcher.dispatch(net.user, frames, NOW)
    net.call(id=3)
    assert net.sent[net.echo.number]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=9), st.binary(max_size=9)
)


@given(st.lists(st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=11), st.binary(max_size=40))
def test_no_header_of_the_wrong_shape_disturbs_the_dispatcher(elements: list[object], body: bytes) -> None:
    net = Net()
    net.dispatcher.dispatch(net.user, [codec.encode(elements), body], NOW)
    net.call(id=3)
    assert net.sent[net.echo.number]


values = st.integers(0, 9)
near_valid = st.builds(
    Header,
    st.just(VERSION),
    values,
    st.one_of(st.sampled_from(["echo", "kernel", "absent", ""]), st.integers(0, 5)),
    st.sampled_from(["say", "hello", "present", "stats", "revoke", "beat", "bye", "_x", ""]),
    values,
    st.integers(0, 2),
    values,
    st.integers(0, NOW * 2),
    st.one_of(st.none(), st.tuples(values, values)),
)


@given(st.lists(st.tuples(st.integers(0, 2), near_valid), max_size=30))
def test_any_traffic_leaves_the_table_consistent(traffic: list[tuple[int, Header]]) -> None:
    net = Net()
    for who, head in traffic:
        sender = (net.user, net.other, net.echo)[who]
        if (sender.lane, sender.rid) in net.table.connections:
            net.dispatcher.dispatch(sender, [header.encode(head), codec.EMPTY], NOW)
    made = {(c.number, id) for c in net.table.connections.values() for id in c.calls}
    served = {key for c in net.table.connections.values() for key in c.serving}
    assert made == served

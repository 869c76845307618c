"""Security as a process, from the attacker's side too: mint, attenuate, present, revoke."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, InvalidArgument, LLMOSError, NotFound
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from llmos.kernel.messages import Verify
from llmos.services.security import audit, tokens
from llmos.services.security.messages import Mint, Minted, Revoked, RevokeToken, StorageKey, StorageKeyQuery

RIGHTS = [
    "echo.say",
    "echo.wait",
    "security.whoami",
    "security.mint",
    "security.revoke",
    "security.verify",
    "security.storage_key",
]
GRANTS = {
    "security": Grant(principal="security", tenant="system", serves="security", calls=["kernel.revoke"]),
    "echo": Grant(principal="echo", tenant="system", serves="echo"),
    "user": Grant(
        principal="user", tenant="local", calls=[*RIGHTS, "kernel.names"], models=["*"], band="realtime"
    ),
    "admin": Grant(principal="admin", tenant="system", calls=RIGHTS),
    "driver.null0": Grant(
        principal="driver.null0", tenant="system", serves="driver.null0", calls=["security.storage_key"]
    ),
    "owner": Grant(principal="owner", tenant="owner", calls=[*RIGHTS, "security.any_tenant"], models=["*"]),
    "stranger": Grant(principal="stranger", tenant="elsewhere", calls=RIGHTS),
}
CHILD = Grant(
    principal="key", tenant="local", calls=["echo.say", "echo.wait", "security.whoami"], models=["a", "b"]
)


class Echo(Server):
    name: ClassVar[str] = "echo"

    def start(self) -> None:
        self.waiting = threading.Event()

    @method
    def say(self, request: str, call: Incoming) -> str:
        return request

    @method
    def wait(self, request: None, call: Incoming) -> Later:
        self.waiting.set()
        return Later()


@pytest.fixture
def booted(system: Callable[[dict[str, Grant]], Any]) -> Any:
    one = system(GRANTS)
    one.kernel()
    one.spawn("security", "llmos.services.security")
    one.echo = one.serve(Echo(one.run))
    one.wait_ready("security", "echo")
    return one


@pytest.fixture
def connect(booted: Any) -> Iterator[Callable[[str], Client]]:
    clients: list[Client] = []

    def make(token: str) -> Client:
        clients.append(Client(token, run=booted.run, timeout=20))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def mint(client: Client, **changes: object) -> Minted:
    return client.call("security.mint", Mint(msgspec.structs.replace(CHILD, **changes)), Minted)


def test_a_minted_token_is_a_key_to_exactly_its_rights(booted: Any, connect: Callable[[str], Client]) -> None:
    minted = mint(booted.client(), max_tokens=5)
    client = connect(minted.token)
    assert client.call("echo.say", "hi") == "hi"
    own = client.call("security.whoami", None, Grant)
    assert own == client.grant
    assert own == msgspec.structs.replace(CHILD, max_tokens=5, chain=minted.ids)
    with pytest.raises(AccessDenied):
        client.call("security.mint", Mint(CHILD))


def test_nobody_mints_more_than_they_hold(booted: Any) -> None:
    client = booted.client()
    for field, value in {
        "calls": ["kernel.revoke"],
        "tenant": "system",
        "serves": "memory",
        "weight": 2.0,
    }.items():
        with pytest.raises(AccessDenied, match="beyond the rights") as refused:
            mint(client, **{field: value})
        assert refused.value.details["fields"] == [field]


def test_an_attenuated_token_holds_less(booted: Any, connect: Callable[[str], Client]) -> None:
    child = tokens.attenuate(mint(booted.client()).token, calls=["security.whoami"], models=["b"])
    client = connect(child)
    assert client.grant.models == ["b"]
    with pytest.raises(AccessDenied):
        client.call("echo.say", "hi")


def test_only_the_kernel_has_tokens_verified(booted: Any) -> None:
    client = booted.client()
    with pytest.raises(AccessDenied, match="only the kernel"):
        client.call("security.verify", Verify(mint(client).token))


def test_a_bad_token_opens_nothing(connect: Callable[[str], Client]) -> None:
    for token in ("", "garbage", "En0KEwoEMTIzNBgDIgkKBwgKEgMYgAg="):
        with pytest.raises(AccessDenied):
            connect(token)


def test_revoking_ends_what_runs_under_a_token_and_under_all_derived_from_it(
    booted: Any, connect: Callable[[str], Client]
) -> None:
    user = booted.client()
    parent = mint(user, calls=[*CHILD.calls, "security.mint"])
    child = connect(tokens.attenuate(parent.token, models=["a"]))
    grandchild = connect(mint(connect(parent.token)).token)
    ended: list[LLMOSError] = []
    thread = threading.Thread(target=lambda: ended.append(fails(lambda: grandchild.call("echo.wait"))))
    thread.start()
    assert booted.echo.waiting.wait(10)
    revoked = user.call("security.revoke", RevokeToken(token=parent.token), Revoked)
    assert revoked == Revoked(grants=3, calls=1)
    thread.join(10)
    assert [type(error) for error in ended] == [AccessDenied]
    with pytest.raises(AccessDenied):
        child.call("echo.say", "hi", timeout=1)
    with pytest.raises(AccessDenied, match="revoked"):
        connect(parent.token)
    assert user.call("echo.say", "still here") == "still here"


def fails(operation: Callable[[], object]) -> LLMOSError:
    with pytest.raises(LLMOSError) as caught:
        operation()
    return caught.value


def test_revoking_a_child_leaves_its_parent(booted: Any, connect: Callable[[str], Client]) -> None:
    user = booted.client()
    parent = mint(user)
    child = tokens.attenuate(parent.token, models=["a"])
    user.call("security.revoke", RevokeToken(token=child))
    with pytest.raises(AccessDenied, match="revoked"):
        connect(child)
    assert connect(parent.token).call("echo.say", "hi") == "hi"


def test_a_revocation_outlives_the_process(booted: Any, connect: Callable[[str], Client]) -> None:
    user = booted.client()
    revoked, kept = mint(user), mint(user)
    user.call("security.revoke", RevokeToken(id=revoked.ids[0]))
    process = booted.processes["security"]
    process.kill()
    process.wait()
    booted.spawn("security", "llmos.services.security")
    booted.wait_ready("security")
    with pytest.raises(AccessDenied, match="revoked"):
        connect(revoked.token)
    assert connect(kept.token).call("echo.say", "hi") == "hi"
    user.call("security.revoke", RevokeToken(id=kept.ids[0]))  # whose it is was in the audit log


def test_only_the_same_tenant_or_the_system_revokes(booted: Any) -> None:
    user, stranger, admin = booted.client(), booted.client("stranger"), booted.client("admin")
    minted = mint(user)
    for request in (RevokeToken(token=minted.token), RevokeToken(id=minted.ids[0])):
        with pytest.raises(AccessDenied, match="same tenant"):
            stranger.call("security.revoke", request)
    admin.call("security.revoke", RevokeToken(id=minted.ids[0]))


def test_with_the_right_for_any_tenant_one_mints_and_revokes_for_others(booted: Any) -> None:
    owner = booted.client("owner")
    theirs = Grant(principal="key", tenant="elsewhere", calls=["security.whoami"])
    minted = owner.call("security.mint", Mint(theirs), Minted)
    assert owner.call("security.revoke", RevokeToken(id=minted.ids[0]), Revoked).grants == 0
    with pytest.raises(AccessDenied, match="beyond the rights"):
        owner.call("security.mint", Mint(msgspec.structs.replace(theirs, tenant="system")))


def test_what_cannot_be_revoked_is_said(booted: Any) -> None:
    client = booted.client()
    refused: list[tuple[RevokeToken, type[LLMOSError]]] = [
        (RevokeToken(), InvalidArgument),
        (RevokeToken(token="x", id="y"), InvalidArgument),
        (RevokeToken(id="nonsense"), InvalidArgument),
        (RevokeToken(id="ab" * 64), NotFound),
        (RevokeToken(token="nonsense"), AccessDenied),
    ]
    for request, error in refused:
        with pytest.raises(error):
            client.call("security.revoke", request)


def test_the_audit_log_tells_what_happened_and_no_secret(
    booted: Any, connect: Callable[[str], Client]
) -> None:
    user = booted.client()
    minted = mint(user)
    user.call("security.revoke", RevokeToken(token=minted.token))
    assert isinstance(fails(lambda: connect(minted.token)), AccessDenied)
    path = Path(booted.env["LLMOS_STATE"]) / "audit.log"
    assert audit.verify(path).lines == 3
    events = list(audit.read(path))
    assert [(event.kind, event.by, event.tenant) for event in events[:2]] == [
        ("mint", "user", "local"),
        ("revoke", "user", "local"),
    ]
    assert events[0].ids == events[1].ids == minted.ids
    assert events[2].kind == "refuse"
    assert minted.token not in path.read_text()


def test_a_flood_of_bad_tokens_does_not_fill_the_log(booted: Any) -> None:
    for _ in range(50):
        with pytest.raises(AccessDenied):
            Client("garbage", run=booted.run, timeout=20)
    path = Path(booted.env["LLMOS_STATE"]) / "audit.log"
    assert audit.verify(path).lines < 40


def test_a_driver_gets_the_key_of_a_tenant_and_a_purpose_and_nobody_else_gets_any(booted: Any) -> None:
    driver = booted.client("driver.null0")
    ask = [StorageKeyQuery(tenant, purpose) for tenant in "ab" for purpose in ("pages", "tasks")]
    keys = [driver.call("security.storage_key", query, StorageKey).key for query in ask]
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == 4
    assert driver.call("security.storage_key", ask[0], StorageKey).key == keys[0]
    for name in ("user", "admin"):
        with pytest.raises(AccessDenied, match="only a driver"):
            booted.client(name).call("security.storage_key", ask[0])
    for wrong in (StorageKeyQuery("", "pages"), {"tenant": "a", "purpose": "other"}):
        with pytest.raises(InvalidArgument):
            driver.call("security.storage_key", wrong)
    assert (booted.run / "state" / "keys" / "storage.key").stat().st_mode & 0o777 == 0o600

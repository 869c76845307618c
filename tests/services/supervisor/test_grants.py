"""Who may call what: deny by default, and exactly what boot.toml and the manifest say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmos.ipc import codec
from llmos.ipc.errors import InvalidArgument
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.supervisor.grants import Rights, boot_file, boot_grants, new_tokens, read_rights
from llmos.services.supervisor.plan import SERVICES

MANIFEST = Manifest(
    drivers=[DriverSpec(name="a"), DriverSpec(name="b")], models=[ModelSpec(name="m", driver="a")]
)
GRANTS = boot_grants(MANIFEST, read_rights())


def test_every_process_has_a_grant_and_serves_its_own_name_only() -> None:
    assert set(GRANTS) == {*SERVICES, "driver.a", "driver.b", "supervisor", "user"}
    for name in (*SERVICES, "driver.a", "driver.b"):
        assert GRANTS[name].serves == name
    assert GRANTS["supervisor"].serves == GRANTS["user"].serves == ""


def test_the_scheduler_and_models_may_call_each_driver_and_nobody_else_may() -> None:
    assert {"driver.a.execute", "driver.b.preempt", "driver.a.move"} <= set(GRANTS["scheduler"].calls)
    assert {"driver.a.load", "driver.b.unload"} <= set(GRANTS["models"].calls)
    allowed = {name for name, grant in GRANTS.items() if any(c.startswith("driver.") for c in grant.calls)}
    assert allowed == {"scheduler", "models", "user"}
    assert [c for c in GRANTS["user"].calls if c.startswith("driver.")] == [
        "driver.a.describe",
        "driver.b.describe",
    ]


def test_a_driver_may_ask_for_storage_keys_and_for_nothing_else() -> None:
    assert GRANTS["driver.a"].calls == ["security.storage_key"]
    allowed = {name for name, grant in GRANTS.items() if "security.storage_key" in grant.calls}
    assert allowed == {"driver.a", "driver.b"}


def test_the_user_is_a_tenant_of_their_own_with_all_models() -> None:
    user = GRANTS["user"]
    assert user.tenant != GRANTS["memory"].tenant
    assert user.models == ["*"]


def test_no_grant_holds_a_wildcard_call() -> None:
    assert not [call for grant in GRANTS.values() for call in grant.calls if "*" in call]


def test_a_service_without_a_table_may_not_run() -> None:
    rights = {name: right for name, right in read_rights().items() if name != "memory"}
    with pytest.raises(InvalidArgument, match=r"no table \[memory\]"):
        boot_grants(MANIFEST, rights)


def test_an_unknown_right_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "boot.toml"
    path.write_text("[memory]\ncalls = []\nroot = true\n")
    with pytest.raises(InvalidArgument, match="root"):
        read_rights(path)


def test_tokens_are_long_and_never_the_same() -> None:
    tokens = new_tokens(["a", "b"])
    assert len(set(tokens.values()) | set(new_tokens(["a"]).values())) == 3
    assert all(len(token) >= 43 for token in tokens.values())


def test_the_kernel_learns_digests_and_no_token() -> None:
    grants = boot_grants(MANIFEST, {**read_rights(), "memory": Rights(calls=[])})
    tokens = new_tokens(grants)
    boot = boot_file(grants, tokens)
    encoded = codec.encode(boot)
    assert {entry.digest for entry in boot.entries} == {
        hashlib.sha256(token.encode()).hexdigest() for token in tokens.values()
    }
    assert not [name for name, token in tokens.items() if token.encode() in encoded]

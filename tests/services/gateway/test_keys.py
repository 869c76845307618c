"""API keys: presented once, bounded in number, given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmos.ipc.errors import AccessDenied, HostDown
from llmos.services.gateway.errors import ApiError
from llmos.services.gateway.keys import KeyRing, read_key


class FakeClient:
    """Gives out handles; refuses the key "bad"."""

    def __init__(self) -> None:
        self.presented: list[str] = []
        self.released: list[int] = []
        self.refuse: dict[str, Exception] = {"bad": AccessDenied("no such token")}

    async def present(self, token: str) -> int:
        self.presented.append(token)
        await asyncio.sleep(0)
        if token in self.refuse:
            raise self.refuse[token]
        return len(self.presented)

    async def release(self, handle: int) -> None:
        self.released.append(handle)


def run(work: Any, capacity: int = 2) -> FakeClient:
    async def main() -> FakeClient:
        client = FakeClient()
        await work(KeyRing(client, capacity), client)  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        return client

    return asyncio.run(main())


def test_all_who_bring_a_key_at_once_share_one_handle() -> None:
    async def work(ring: KeyRing, client: FakeClient) -> None:
        assert await asyncio.gather(*[ring.handle("a") for _ in range(10)]) == [1] * 10
        assert client.presented == ["a"]

    run(work)


def test_one_who_leaves_does_not_take_the_key_from_the_others() -> None:
    async def work(ring: KeyRing, client: FakeClient) -> None:
        leaving = asyncio.ensure_future(ring.handle("a"))
        staying = asyncio.ensure_future(ring.handle("a"))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == 1

    run(work)


def test_the_key_unused_for_longest_gives_way_and_its_handle_is_given_back() -> None:
    async def work(ring: KeyRing, client: FakeClient) -> None:
        for key in ("a", "b", "a", "c"):
            await ring.handle(key)
        assert len(ring) == 2
        assert await ring.handle("a") == 1

    assert run(work).released == [2]


def test_a_refused_key_is_not_kept() -> None:
    async def work(ring: KeyRing, client: FakeClient) -> None:
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await ring.handle("bad")
            assert caught.value.status == 401
        assert len(ring) == 0
        client.refuse["x"] = HostDown("security is not running")
        with pytest.raises(HostDown):
            await ring.handle("x")
        del client.refuse["x"]
        assert await ring.handle("x")

    run(work)


def test_a_refusal_is_401_only_if_the_key_itself_is_no_longer_good() -> None:
    async def work(ring: KeyRing, client: FakeClient) -> None:
        await ring.handle("a")
        assert await ring.denied("a", AccessDenied("not allowed")) is None
        client.refuse["a"] = AccessDenied("revoked")
        refused = await ring.denied("a", AccessDenied("no capability"))
        assert refused is not None
        assert refused.status == 401

    run(work)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic abc", "Bearer " + "x" * 20_000])
def test_a_header_without_a_key_is_401(header: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read_key(header)
    assert caught.value.status == 401


def test_the_scheme_may_be_written_either_way() -> None:
    assert read_key("bearer abc ") == read_key("Bearer abc") == "abc"

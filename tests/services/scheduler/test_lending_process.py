"""Two models in one pool with real processes. The null driver refuses a sequence that uses a slab which was
given to the other model, so the right tokens also mean that no page was two models' at a time."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from llmos.drivers.sdk.messages import LoadedModel, LoadProgress
from llmos.ipc import codec
from llmos.ipc.grant import Band, Grant
from llmos.ipc.header import Kind
from llmos.services.memory.messages import Usage
from llmos.services.scheduler.messages import Host, Submit, Unhost
from tests.conftest import System, wait_until
from tests.services.scheduler.test_scheduler_process import GRANTS, expected
from tests.services.scheduler.test_swapping_process import COUNT, Crowd

MODELS = {"m": 4, "n": 10}  # page tokens
ARENA = 32 * 144


class Crowds(Crowd):
    """Batch tasks of one model fill the pool, then interactive ones of the other come."""

    def host(self) -> LoadedModel:
        for name, page_tokens in MODELS.items():
            load = msgspec.structs.replace(
                self.load, model=name, page_tokens=page_tokens, slots=6, pages=0, host_pages=300,
                arena="shared", arena_bytes=ARENA,
            )  # fmt: skip
            *_, loaded = self.user.stream("driver.null0.load", load, LoadProgress, LoadedModel)
            assert isinstance(loaded, LoadedModel)
            self.user.call("scheduler.host", Host("null0", loaded))
        return loaded

    def ask(self, model: str, prompt: list[int], band: Band) -> None:
        calls: list[int] = []
        body = codec.encode(Submit(model=model, tokens=prompt, max_tokens=COUNT, band=band))
        calls.append(
            self.user._link.call("scheduler.submit", body, 0, lambda a: self.ended.update({calls[0]: a}))
        )
        self.prompts[calls[0]] = prompt

    def come(self) -> None:
        for number in range(6):
            self.ask("m", [number] * 80, "batch")
        wait_until(lambda: bool(self.stats()) and len(self.got) >= 3, what="the batch tasks")
        for number in range(6):
            self.ask("n", [10 + number] * 60, "interactive")

    def pool(self) -> Usage:
        return self.user.call("memory.usage", None, Usage)

    def check(self) -> None:
        wait_until(lambda: bool(self.stats()) and len(self.ended) == len(self.prompts), what="the end")
        for call, prompt in self.prompts.items():
            assert self.ended[call].kind == Kind.END, self.ended[call].error
            assert self.got[call] == expected(prompt, COUNT)
        wait_until(lambda: not any(arena.owned for arena in self.pool().arenas), what="pages given back")
        usage = self.pool()
        (pool,) = usage.pools
        assert pool.free + sum(arena.slabs for arena in usage.arenas) == pool.slabs == 32
        for arena in usage.arenas:
            assert arena.free + arena.cached == arena.total


@pytest.fixture
def crowds(system: Callable[[dict[str, Grant]], System]) -> Crowds:
    return Crowds(system(GRANTS))


def test_models_lend_each_other_pages_and_produce_their_tokens(crowds: Crowds) -> None:
    for number in range(6):
        crowds.ask("m", [number] * 80, "batch")
    wait_until(lambda: max(arena.slabs for arena in crowds.pool().arenas) > 16, what="a model that borrows")
    for number in range(6):
        crowds.ask("n", [10 + number] * 60, "interactive")
    crowds.check()
    assert crowds.stats().displaced > 0


@pytest.mark.parametrize("name", ["memory", "driver.null0"])
def test_tasks_of_both_models_continue_when_someone_is_killed(crowds: Crowds, name: str) -> None:
    crowds.come()
    crowds.restart(name)
    crowds.check()


def test_a_model_that_goes_leaves_its_slabs_to_the_other(crowds: Crowds) -> None:
    crowds.come()
    crowds.user.call("scheduler.unhost", Unhost("null0", "m"))
    wait_until(lambda: crowds.pool().pools[0].share == 32, what="an arena that is gone")
    mine = {call for call, prompt in crowds.prompts.items() if prompt[0] >= 10}
    wait_until(lambda: bool(crowds.stats()) and mine <= crowds.ended.keys(), what="the other model's tasks")
    for call in mine:
        assert crowds.got[call] == expected(crowds.prompts[call], COUNT)

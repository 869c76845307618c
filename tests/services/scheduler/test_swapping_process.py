"""Swapping with real processes. The null driver refuses a sequence whose KV is not in its pages, so the right
tokens also mean that every page was moved to where it belongs, whatever died meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.grant import Band, Grant
from llmos.ipc.header import Kind
from llmos.services.manifest import DriverSpec, Manifest
from llmos.services.memory.messages import TierUsage
from llmos.services.scheduler.messages import Emitted, SchedulerStats, Submit
from tests.conftest import System, wait_until
from tests.services.scheduler.test_scheduler_process import GRANTS, Bench, expected

COUNT = 120
OPTIONS = {"step_ms": 2.0, "prefill_us": 2000.0, "move_us": 300.0}  # whatever can be swapped is


class Crowd(Bench):
    """More contexts than the device holds: batch tasks, then interactive ones that displace them."""

    def __init__(self, system: System) -> None:
        super().__init__(system, slots=4, pages=120)
        self.load = msgspec.structs.replace(self.load, model="m", host_pages=300)
        driver = DriverSpec(name="null0", kind="null", options=dict(OPTIONS))
        system.write_manifest(Manifest(drivers=[driver], models=[]))
        self.restart("driver.null0")
        self.got: dict[int, list[int]] = {}
        self.ended: dict[int, Answer] = {}
        self.prompts: dict[int, list[int]] = {}
        self.user._link.call("scheduler.attach", codec.EMPTY, 0, self._tokens)

    def restart(self, name: str) -> None:
        """``kill -9``, and what the supervisor and the models service do then."""
        self.kill(name)
        self.start(name)
        self.system.wait_ready(name)
        if name != "memory":
            self.host()

    def submit(self, prompt: list[int], band: Band) -> None:
        calls: list[int] = []
        body = codec.encode(Submit(model="m", tokens=prompt, max_tokens=COUNT, band=band))
        calls.append(
            self.user._link.call("scheduler.submit", body, 0, lambda a: self.ended.update({calls[0]: a}))
        )
        self.prompts[calls[0]] = prompt

    def come(self) -> None:
        """Let the batch tasks start, then the others."""
        for number in range(4):
            self.submit([number] * 80, "batch")
        wait_until(lambda: bool(self.stats()) and len(self.got) >= 3, what="the batch tasks")
        for number in range(4):
            self.submit([10 + number] * 60, "interactive")

    def stats(self) -> SchedulerStats:
        return self.user.call("scheduler.stats", None, SchedulerStats)

    def host_tier(self) -> TierUsage:
        (tier,) = self.usage().tiers
        return tier

    def check(self) -> None:
        """All tasks end with exactly their tokens, each sent once, and nothing is held any more."""
        wait_until(lambda: bool(self.stats()) and len(self.ended) == len(self.prompts), what="the end")
        for call, prompt in self.prompts.items():
            assert self.ended[call].kind == Kind.END, self.ended[call].error
            assert self.got[call] == expected(prompt, COUNT)
        wait_until(lambda: self.usage().owned == self.host_tier().owned == 0, what="pages given back")
        usage, tier = self.usage(), self.host_tier()
        assert usage.free + usage.cached == usage.total
        assert tier.free + tier.cached == tier.total

    def _tokens(self, answer: Answer) -> None:
        for item in codec.decode(answer.body, Emitted).tokens if answer.error is None else ():
            assert item.offset == len(self.got.setdefault(item.call, [])), "a token was lost or sent twice"
            self.got[item.call].extend(item.tokens)


@pytest.fixture
def crowd(system: Callable[[dict[str, Grant]], System]) -> Crowd:
    return Crowd(system(GRANTS))


def test_displaced_tasks_are_swapped_and_continue_exactly(crowd: Crowd) -> None:
    crowd.come()
    wait_until(lambda: crowd.host_tier().owned > 0, what="pages in host memory")
    crowd.check()
    assert crowd.stats().displaced > 0


@pytest.mark.parametrize("name", ["memory", "driver.null0"])
def test_tasks_continue_when_someone_is_killed_while_pages_move(crowd: Crowd, name: str) -> None:
    crowd.come()
    wait_until(lambda: crowd.usage().moving > 0, what="pages on their way")
    crowd.restart(name)
    crowd.check()


def test_a_new_scheduler_finds_every_tier_empty(crowd: Crowd) -> None:
    crowd.come()
    wait_until(lambda: crowd.usage().moving > 0, what="pages on their way")
    crowd.restart("scheduler")
    wait_until(lambda: bool(crowd.stats()) and len(crowd.ended) == len(crowd.prompts), what="the end")
    assert crowd.usage().owned == crowd.host_tier().owned == 0
    assert crowd.generate([1, 2, 3], 20) == expected([1, 2, 3], 20)


def test_a_conversation_goes_on_from_host_memory(crowd: Crowd) -> None:
    first = [7] * 60
    crowd.generate(first, 4)
    for number in range(10):
        crowd.generate([20 + number] * 60, 4)
        wait_until(lambda: crowd.usage().moving == 0, what="cached pages in host memory")
    assert crowd.host_tier().cached > 0
    *_, last = crowd.user.stream(
        "scheduler.submit", Submit(model="m", tokens=[*first, 8, 9], max_tokens=2), dict
    )
    assert last["cached_tokens"] == 60

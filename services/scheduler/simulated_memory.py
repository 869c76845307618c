"""The core's calls to memory and between tiers in simulated time: the real memory policy behind a latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from llmos.drivers.sdk.messages import Moved
from llmos.ipc.errors import HostDown, LLMOSError, NoMemory
from llmos.services.memory.arena import Arena
from llmos.services.memory.messages import Batch, Costs, Transfer
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.lasting import Room
from llmos.services.scheduler.lending import Debts
from llmos.services.scheduler.simulated_clock import Clock
from llmos.services.scheduler.task import Place, Task

if TYPE_CHECKING:
    from llmos.services.scheduler.core import Core
    from llmos.services.scheduler.simulated_device import Device

T = TypeVar("T")
RETRY_SECONDS = 0.05


class MemoryCalls(Clock):
    """Implements ``PageEffects`` and ``SwapEffects``; answers go back to the core as events."""

    core: Core
    memories: dict[str, Arena]
    devices: dict[str, Device]
    moved_bytes: int

    def _ask(
        self,
        host: Host,
        call: Callable[[Arena], T],
        reply: Callable[[T], None],
        fail: Callable[[LLMOSError], None],
    ) -> None:
        """A call to memory and its answer; HostDown where memory was started anew in between."""
        memory = self.memories[host.arena]

        def arrive() -> None:
            try:
                if self.memories[host.arena] is not memory:
                    raise HostDown("memory went down")
                answer = call(memory)
            except LLMOSError as error:
                self.soon(lambda error=error: fail(error))  # type: ignore[misc]
            else:
                self.soon(lambda: deliver(answer))

        def deliver(answer: T) -> None:
            # What memory said before it died arrives before the news of its death, or never.
            if self.memories[host.arena] is memory:
                reply(answer)
            else:
                fail(HostDown("memory went down"))

        self.soon(arrive)

    def _tell(self, host: Host, call: Callable[[Arena], object]) -> None:
        """A cast to memory; nobody learns what becomes of it."""
        self._ask(host, call, lambda _: None, lambda _: None)

    def reserve(self, host: Host, task: Task, extra: int, room: Room) -> None:
        hurry, borrow = host.tiers.hurries(task), host.may_borrow

        def call(memory: Arena) -> tuple[list[int], int, Transfer | None, bool]:
            pages, cached = memory.reserve(
                task.id, task.tenant, list(task.tokens), extra, task.max_pages, hurry, task.adapter, borrow,
                *room,
            )  # fmt: skip
            return pages, cached, _transfer(memory, task), memory.tiers.low

        def reply(got: tuple[list[int], int, Transfer | None, bool]) -> None:
            self.core.paging.reserved(host, task, got[0], got[1], self.now, *got[2:])

        def fail(error: LLMOSError) -> None:
            if isinstance(error, NoMemory):
                self.core.paging.refused(host, task, self.now, error)
            elif isinstance(error, HostDown):
                self.at(self.now + RETRY_SECONDS, lambda: self.reserve(host, task, extra, room))
            else:
                self.core.kill(task, error, self.now)

        if task.place is Place.RESERVING and self.core.hosts.get(host.arena) is host:
            self._ask(host, call, reply, fail)

    def grow(self, host: Host, wants: list[tuple[Task, int]]) -> None:
        asked, borrow = {task.id: (task, task.residence) for task, _ in wants}, host.may_borrow

        def call(memory: Arena) -> tuple[list[tuple[int, list[int]]], bool, Debts]:
            # A task that gave its pages back meanwhile is unknown to memory by now.
            known = [(t.id, n) for t, n in wants if t.id in memory.tasks and not memory.tasks[t.id].away]
            return memory.grow(known, borrow), memory.tiers.low, Debts(*memory.pool.debts())

        def reply(got: tuple[list[tuple[int, list[int]]], bool, Debts]) -> None:
            self.core.paging.grown(host, [(*asked[i], pages) for i, pages in got[0]], self.now, *got[1:])

        def fail(error: LLMOSError) -> None:
            for task, _ in wants:
                task.growing = False
            self.at(self.now + RETRY_SECONDS, lambda: self.core.paging.grown(host, [], self.now))

        self._ask(host, call, reply, fail)

    def free(self, host: Host, tasks: list[Task]) -> None:
        self._tell(host, lambda memory: memory.free([task.id for task in tasks]))

    def commit(self, host: Host, tasks: list[Task]) -> None:
        lines = [(task.id, task.tokens[task.committed :], task.computed) for task in tasks]
        for task in tasks:
            task.committed = len(task.tokens)
        self._tell(host, lambda memory: memory.commit([line for line in lines if line[0] in memory.tasks]))

    def wake(self, seconds: float) -> None:
        self.at(self.now + seconds, lambda: self.core.lending.wake(self.now))

    def swap_out(self, host: Host, task: Task) -> None:
        residence, swapping = task.residence, self.core.swapping
        self._ask(
            host,
            lambda memory: memory.tiers.swap_out(task.id).message(),
            lambda transfer: swapping.going(host, task, residence, transfer),
            lambda error: swapping.stays(host, task, residence, error, self.now),
        )

    def swap_in(self, host: Host, task: Task, extra: int, spare: int) -> None:
        residence, swapping = task.residence, self.core.swapping
        hurry, borrow = host.tiers.hurries(task), host.may_borrow

        def call(memory: Arena) -> tuple[list[int], int, Transfer | None]:
            pages, cached = memory.tiers.swap_in(task.id, extra, spare, hurry, borrow)
            return pages, cached, _transfer(memory, task)

        self._ask(
            host,
            call,
            lambda got: swapping.coming(host, task, residence, *got, self.now),
            lambda error: swapping.must_wait(host, task, residence, error, self.now),
        )

    def demote(self, host: Host) -> None:
        def call(memory: Arena) -> Transfer:
            transfer = memory.tiers.demote()
            return transfer.message() if transfer else Transfer(0, [])

        def fail(error: LLMOSError) -> None:
            host.tiers.demoting = False

        self._ask(host, call, lambda transfer: self.core.swapping.demotion(host, transfer, self.now), fail)

    def transfer(self, host: Host, transfer: Transfer, done: int = 0) -> None:
        def moved(batch: Batch, answer: Moved | None) -> None:
            if answer is None:
                self._settle(host, transfer, done)
                return
            self.moved_bytes += answer.bytes
            host.tiers.links.observe(batch, answer)
            self.transfer(host, transfer, done + 1)

        if done == len(transfer.batches):
            self._settle(host, transfer, done)
        else:
            batch, device = transfer.batches[done], self.devices[host.arena]
            self.soon(lambda: device.move(batch, lambda answer: moved(batch, answer)))

    def _settle(self, host: Host, transfer: Transfer, done: int) -> None:
        complete, swapping = done == len(transfer.batches), self.core.swapping

        def call(memory: Arena) -> tuple[int, bool]:
            task = memory.tiers.settle(transfer.id, done)
            return task.computed if task else 0, memory.tiers.low

        self._ask(
            host,
            call,
            lambda got: swapping.settled(host, transfer.id, complete, *got, self.now),
            lambda _: swapping.settled(host, transfer.id, False, 0, False, self.now),
        )

    def abort(self, host: Host, transfer: Transfer) -> None:
        if transfer.batches:
            self._tell(host, lambda memory: memory.tiers.settle(transfer.id, 0))

    def teach(self, host: Host, costs: Costs) -> None:
        self._tell(host, lambda memory: memory.tiers.learn(costs))


def _transfer(memory: Arena, task: Task) -> Transfer | None:
    transfer = memory.tasks[task.id].transfer
    return transfer.message() if transfer else None

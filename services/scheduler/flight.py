"""A quantum that was sent, and what is still to come of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from llmos.drivers.sdk.messages import Quantum
from llmos.services.scheduler.task import Place, Task


@dataclass(slots=True)
class InFlight:
    """A quantum, and who sat in the slots when it was sent: (task, which of its stays on a device this is).

    ``gaining`` are the first and last step in which each slot gains tokens. ``received`` steps have come;
    once it is ``final``, all others are on the device, and none can be taken back.
    """

    quantum: Quantum
    seats: dict[int, tuple[Task, int]]
    gaining: dict[int, tuple[int, int]] = field(init=False)
    received: int = 0
    final: bool = False

    def __post_init__(self) -> None:
        """A slot gains tokens from its last chunk on, or from the first step if it has none."""
        last = self.quantum.steps - 1
        self.gaining = dict.fromkeys(self.quantum.decode, (0, last))
        for chunk in self.quantum.chunks:
            if chunk.slot in self.seats and chunk.start + chunk.length == self.seats[chunk.slot][0].base:
                self.gaining[chunk.slot] = chunk.step, last if chunk.slot in self.gaining else chunk.step

    @property
    def to_come(self) -> int:
        """How many of its steps have not come yet."""
        return self.quantum.steps - self.received

    def sitter(self, slot: int) -> Task | None:
        """Who sat in a slot and sits there still; None if that stay is over."""
        task, stay = self.seats.get(slot, (None, 0))
        return task if task is not None and task.stay == stay and task.place is Place.RUNNING else None

    def coming(self, task: Task, steps: int = 1 << 30) -> int:
        """How many tokens of a task are on their way in the next ``steps``, at one a step."""
        if self.sitter(task.slot) is not task or task.slot not in self.gaining:
            return 0
        first, last = self.gaining[task.slot]
        return max(0, min(last + 1, self.received + steps) - max(first, self.received))

    def prefills(self, task: Task) -> int:
        """How many tokens of a task's prompt are computed once it has ended; 0 where it computes none."""
        if self.sitter(task.slot) is not task:
            return 0
        chunks = (chunk for chunk in self.quantum.chunks if chunk.slot == task.slot)
        return max((chunk.start + chunk.length for chunk in chunks), default=0)

    def end_after(self, steps: int) -> None:
        """It was taken back when so many of its steps had been dispatched."""
        chunks = [chunk for chunk in self.quantum.chunks if chunk.step < steps]
        self.quantum = replace(self.quantum, steps=steps, chunks=chunks)
        gaining = self.gaining.items()
        self.gaining = {
            slot: (first, min(last, steps - 1)) for slot, (first, last) in gaining if first < steps
        }
        self.final = True

    @property
    def tasks(self) -> list[Task]:
        """Those of the tasks that are still there."""
        return [task for slot in self.seats if (task := self.sitter(slot)) is not None]

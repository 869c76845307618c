"""Which questions are open, and the last answers to them. No I/O, no clock."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import LLMOSError
from llmos.kernel.messages import Names, Stats
from llmos.services.memory.messages import Usage
from llmos.services.models.messages import ModelList
from llmos.services.scheduler.messages import SchedulerStats


class Question(NamedTuple):
    target: str
    type: Any


QUESTIONS = (
    Question("kernel.names", Names),
    Question("kernel.stats", Stats),
    Question("scheduler.stats", SchedulerStats),
    Question("memory.usage", Usage),
    Question("models.list", ModelList),
)


class Poller:
    """The answers by question; one that was not answered in its turn has none."""

    def __init__(self) -> None:
        self._answers: dict[str, Any] = {}
        self._open: set[str] = set()
        self.errors: dict[str, str] = {}

    def ask(self) -> list[Question]:
        """The questions to put now: those that are not open already."""
        due = [question for question in QUESTIONS if question.target not in self._open]
        self._open.update(question.target for question in due)
        return due

    def take(self, question: Question, answer: Answer) -> None:
        """Note the answer to a question."""
        self._open.discard(question.target)
        try:
            if answer.error is not None:
                raise answer.error
            self._answers[question.target] = codec.decode(answer.body, question.type)
            self.errors.pop(question.target, None)
        except LLMOSError as error:
            self._answers.pop(question.target, None)
            self.errors[question.target] = str(error)

    def forget(self, service: str) -> None:
        """A service went down: what it said is no longer so."""
        for question in QUESTIONS:
            if question.target.rpartition(".")[0] == service:
                self._answers.pop(question.target, None)

    def reset(self) -> None:
        """The kernel was started anew: every open question is gone with it."""
        self._open.clear()

    @property
    def complete(self) -> bool:
        """Whether no question is open."""
        return not self._open

    @property
    def names(self) -> Names | None:
        return self._answers.get("kernel.names")

    @property
    def kernel(self) -> Stats | None:
        return self._answers.get("kernel.stats")

    @property
    def scheduler(self) -> SchedulerStats | None:
        return self._answers.get("scheduler.stats")

    @property
    def memory(self) -> Usage | None:
        return self._answers.get("memory.usage")

    @property
    def models(self) -> ModelList | None:
        return self._answers.get("models.list")

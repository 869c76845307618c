"""The open questions: none is asked twice at once, and a failed one has no answer."""

from __future__ import annotations

from llmos.ipc import codec
from llmos.ipc.calls import Answer
from llmos.ipc.errors import HostDown
from llmos.ipc.header import Kind
from llmos.kernel.messages import Names
from llmos.services.monitor.poller import QUESTIONS, Poller

NAMES = QUESTIONS[0]


def answer(body: object) -> Answer:
    return Answer(Kind.REPLY, codec.encode(body), [])


FAILED = Answer(Kind.ERROR, b"", [], HostDown("gone"))


def test_each_question_is_open_once() -> None:
    poller = Poller()
    assert poller.ask() == list(QUESTIONS)
    assert poller.ask() == []
    assert not poller.complete
    poller.take(NAMES, answer(Names([])))
    assert poller.ask() == [NAMES]


def test_an_answer_is_kept_until_the_next() -> None:
    poller = Poller()
    for question in poller.ask():
        poller.take(question, answer(Names([])) if question is NAMES else FAILED)
    assert poller.complete
    assert poller.names == Names([])
    assert poller.scheduler is None
    assert "EHOSTDOWN" in poller.errors["scheduler.stats"]
    poller.ask()
    poller.take(NAMES, FAILED)
    assert poller.names is None


def test_an_answer_that_makes_no_sense_is_none() -> None:
    poller = Poller()
    poller.ask()
    poller.take(NAMES, answer({"names": 3}))
    assert poller.names is None


def test_what_a_dead_service_said_is_forgotten() -> None:
    poller = Poller()
    poller.ask()
    poller.take(NAMES, answer(Names([])))
    poller.forget("kernel")
    assert poller.names is None


def test_a_new_kernel_is_asked_everything_again() -> None:
    poller = Poller()
    poller.ask()
    poller.reset()
    assert poller.ask() == list(QUESTIONS)

"""The executor: two steps in flight, quanta in order, a preempt between steps, each answered once."""

from __future__ import annotations

from collections.abc import Iterator

from llmos.drivers.sdk.driver import Driver, Pending, PendingEncoding, PendingStep
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import EncodedStep, EncodeStep, Quantum, QuantumDone, Step
from llmos.ipc.errors import Canceled, InvalidArgument, IOFailure, LLMOSError


class Scripted(Driver):
    """Notes what is asked of it; ``fail_at`` names (quantum, step) whose result is an error."""

    def __init__(self, fail_at: tuple[int, int] = (0, 0), refuse: int = 0) -> None:
        self.log: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._fail_at = fail_at
        self._refuse = refuse

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        if quantum.id == self._refuse:
            raise InvalidArgument("refused")
        self.log.append(f"begin {quantum.id}")
        return self._steps(quantum)

    def _steps(self, quantum: Quantum) -> Iterator[PendingStep]:
        for index in range(quantum.steps):
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.log.append(f"dispatch {quantum.id}.{index}")
            yield lambda index=index: self._result(quantum.id, index)  # type: ignore[misc]

    def _result(self, quantum: int, index: int) -> Step:
        self.in_flight -= 1
        if (quantum, index) == self._fail_at:
            raise IOFailure("the device failed")
        return Step(quantum, index, [], [], [], 0)


class Notes:
    """A sink that writes down what it gets."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.ended: list[QuantumDone | LLMOSError] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def done(self, done: QuantumDone) -> None:
        self.ended.append(done)

    def fail(self, error: LLMOSError) -> None:
        self.ended.append(error)


def quantum(id: int, steps: int) -> Quantum:
    return Quantum(id=id, model="m", steps=steps)


def run(executor: Executor) -> None:
    while executor.advance():
        pass


def test_results_come_in_order_and_each_quantum_ends_once() -> None:
    driver, notes = Scripted(), Notes()
    executor = Executor(driver)
    for id in (1, 2):
        executor.submit(quantum(id, 3), notes)
    run(executor)
    assert [(s.quantum, s.index) for s in notes.steps] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert notes.ended == [QuantumDone(1, 3, False), QuantumDone(2, 3, False)]


def test_two_steps_are_in_flight_across_quanta_and_never_more() -> None:
    driver = Scripted()
    executor = Executor(driver)
    for id in (1, 2):
        executor.submit(quantum(id, 2), Notes())
    executor.advance()
    executor.advance()
    assert "dispatch 2.0" in driver.log, "the next quantum begins before the last one's results are in"
    run(executor)
    assert driver.most_in_flight == 2


def test_a_preempt_stops_dispatching_at_the_next_step() -> None:
    driver, notes = Scripted(), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 100), notes)
    executor.advance()
    assert executor.preempt(1) == [(1, 2)], "told at once, while both steps are computed"
    run(executor)
    assert notes.ended == [QuantumDone(1, 2, True)]
    assert len(notes.steps) == 2


def test_a_quantum_preempted_before_it_began_still_changes_the_slots() -> None:
    driver, notes = Scripted(), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 100), notes)
    executor.submit(quantum(2, 100), notes)
    assert executor.preempt(2) == [(1, 0), (2, 0)]
    run(executor)
    assert driver.log == ["begin 1", "begin 2"]
    assert notes.ended == [QuantumDone(1, 0, True), QuantumDone(2, 0, True)]


def test_a_preempt_names_what_was_dispatched_whole_and_not_what_has_ended() -> None:
    driver, notes = Scripted(), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 1), notes)
    executor.submit(quantum(2, 9), notes)
    executor.advance()
    assert executor.preempt(2) == [(1, 1), (2, 1)], "the end of the first is still to be sent"
    executor.submit(quantum(3, 9), notes)
    run(executor)
    assert notes.ended == [QuantumDone(1, 1, False), QuantumDone(2, 1, True), QuantumDone(3, 9, False)]
    assert executor.preempt(3) == []


def test_a_preempt_leaves_the_quanta_of_another_model_alone() -> None:
    executor, notes = Executor(Scripted()), Notes()
    executor.submit(Quantum(id=1, model="other", steps=3), notes)
    executor.submit(quantum(2, 9), notes)
    assert executor.preempt(2) == [(2, 0)]
    run(executor)
    assert notes.ended == [QuantumDone(1, 3, False), QuantumDone(2, 0, True)]


def test_a_refused_quantum_fails_and_the_next_runs() -> None:
    driver, notes = Scripted(refuse=1), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 1), notes)
    executor.submit(quantum(2, 1), notes)
    run(executor)
    assert isinstance(notes.ended[0], InvalidArgument)
    assert notes.ended[1] == QuantumDone(2, 1, False)


def test_a_step_that_fails_on_the_device_ends_its_quantum() -> None:
    driver, notes = Scripted(fail_at=(1, 1)), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 5), notes)
    run(executor)
    assert len(notes.steps) == 1
    assert [type(end) for end in notes.ended] == [IOFailure]


def test_abandoning_waits_for_the_device_and_tells_every_caller() -> None:
    driver, notes = Scripted(), Notes()
    executor = Executor(driver)
    executor.submit(quantum(1, 100), notes)
    executor.submit(quantum(2, 100), notes)
    executor.advance()
    executor.abandon()
    assert driver.in_flight == 0
    assert [type(end) for end in notes.ended] == [Canceled, Canceled]
    assert not executor.advance()


class Encoder(Scripted):
    """Also encodes: notes when a step is dispatched and when it is waited for."""

    def encode(self, request: EncodeStep) -> PendingEncoding:
        text = request.texts[0][0]
        if text == 99:
            raise InvalidArgument("refused")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.log.append(f"encode {text}")

        def wait() -> EncodedStep:
            self.in_flight -= 1
            if text == 98:
                raise IOFailure("the device failed")
            return EncodedStep(bytes([text]), 1, 0)

        return wait


class EncodingNotes:
    def __init__(self) -> None:
        self.ended: list[bytes | LLMOSError] = []

    def encoded(self, result: EncodedStep) -> None:
        self.ended.append(result.rows)

    def fail(self, error: LLMOSError) -> None:
        self.ended.append(error)


def text(token: int) -> EncodeStep:
    return EncodeStep(model="e", texts=[[token]])


def test_an_encoders_steps_take_turns_with_those_of_a_quantum() -> None:
    driver, notes, encoded = Encoder(), Notes(), EncodingNotes()
    executor = Executor(driver)
    executor.submit(quantum(1, 4), notes)
    for token in range(3):
        executor.encode(text(token), encoded)
    run(executor)
    work = [entry.split()[0] for entry in driver.log if not entry.startswith("begin")]
    assert work[:6] in (["dispatch", "encode"] * 3, ["encode", "dispatch"] * 3)
    assert encoded.ended == [b"\0", b"\1", b"\2"]
    assert (len(notes.steps), driver.most_in_flight) == (4, 2)


def test_an_encoders_step_that_fails_concerns_nobody_else() -> None:
    driver, notes, encoded = Encoder(), Notes(), EncodingNotes()
    executor = Executor(driver)
    executor.submit(quantum(1, 3), notes)
    for token in (99, 98, 5):
        executor.encode(text(token), encoded)
    run(executor)
    assert {type(end) for end in encoded.ended[:2]} == {InvalidArgument, IOFailure}
    assert encoded.ended[2] == b"\5"
    assert [type(end) for end in notes.ended] == [QuantumDone]


def test_what_is_abandoned_is_that_of_the_model_alone() -> None:
    driver, notes, encoded = Encoder(), Notes(), EncodingNotes()
    executor = Executor(driver)
    executor.submit(quantum(1, 8), notes)
    for token in range(5):
        executor.encode(text(token), encoded)
    executor.advance()
    executor.abandon("m")
    assert [type(end) for end in notes.ended] == [Canceled]
    run(executor)
    assert encoded.ended == [bytes([token]) for token in range(5)]
    executor.encode(text(1), encoded)
    executor.advance()
    executor.abandon()
    assert driver.in_flight == 0


class Replicated(Driver):
    """Replicas whose steps are done when the test says so."""

    def __init__(self) -> None:
        self.dispatched: list[tuple[int, int]] = []
        self.done: set[int] = set()

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        for index in range(quantum.steps):
            self.dispatched.append((quantum.id, index))
            step = Step(quantum.id, index, [], [], [], 0)
            yield Pending(lambda step=step: step, lambda: quantum.replica in self.done)  # type: ignore[misc]


def replicated(id: int, replica: int, steps: int = 4) -> Quantum:
    return Quantum(id=id, model="m", steps=steps, replica=replica)


def test_a_replica_that_waits_does_not_hold_up_another() -> None:
    driver, slow, fast = Replicated(), Notes(), Notes()
    executor = Executor(driver, pause=lambda _: None)
    executor.submit(replicated(1, 0), slow)
    executor.submit(replicated(2, 1), fast)
    driver.done = {1}
    for _ in range(5):
        executor.advance()
    assert fast.ended == [QuantumDone(2, 4, False)]
    assert driver.dispatched.count((1, 0)) == driver.dispatched.count((1, 1)) == 1
    assert (1, 2) not in driver.dispatched, "two steps of each replica are in flight, never more"
    assert not slow.steps
    driver.done = {0}
    run(executor)
    assert slow.ended == [QuantumDone(1, 4, False)]


def test_all_replicas_waiting_pauses_instead_of_blocking_on_one() -> None:
    driver, pauses = Replicated(), list[float]()
    executor = Executor(driver, pauses.append)
    for id, replica in ((1, 0), (2, 1)):
        executor.submit(replicated(id, replica), Notes())
    assert executor.advance()
    assert len(pauses) == 1


def test_a_replica_that_is_busy_alone_does_not_keep_what_comes_for_another_waiting() -> None:
    driver, pauses = Replicated(), list[float]()
    executor = Executor(driver, pauses.append)
    driver.done = {0, 1}
    for id, replica in ((1, 0), (2, 1)):
        executor.submit(replicated(id, replica), Notes())
    run(executor)
    driver.done = set()
    pauses.clear()
    executor.submit(replicated(3, 0), Notes())
    assert executor.advance()
    assert pauses, "the step is not waited for"
    executor.submit(replicated(4, 1), Notes())
    executor.advance()
    assert (4, 0) in driver.dispatched


def test_preempt_and_abandon_reach_one_replica() -> None:
    driver, first, second = Replicated(), Notes(), Notes()
    driver.done = {0, 1}
    executor = Executor(driver)
    executor.submit(replicated(1, 0), first)
    executor.submit(replicated(2, 1), second)
    executor.advance()
    assert executor.preempt(2) == [(2, 2)]
    run(executor)
    assert first.ended == [QuantumDone(1, 4, False)]
    assert second.ended == [QuantumDone(2, 2, True)]
    executor.submit(replicated(3, 0), first)
    executor.submit(replicated(4, 1), second)
    executor.abandon(replica=1)
    run(executor)
    assert first.ended[1:] == [QuantumDone(3, 4, False)]
    assert [type(end) for end in second.ended[1:]] == [Canceled]

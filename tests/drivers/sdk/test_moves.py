"""Moves: checked first, ordered with the quanta, copied beside the steps, finished on the driver's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from llmos.drivers.null.driver import NullDriver, next_token
from llmos.drivers.sdk.driver import PendingMove
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import Chunk, LoadedModel, LoadRequest, Move, Moved, Quantum, Start
from llmos.drivers.sdk.moves import Moves, check_move
from llmos.ipc.errors import Canceled, InvalidArgument, LLMOSError, NotSupported
from tests.drivers.sdk.test_executor import Notes, Scripted, run

REQUEST = LoadRequest(
    model="m", source="", slots=2, pages=8, page_tokens=4, max_context=32, chunk_tokens=8, host_pages=4
)


class Worker:
    """A background whose work is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    def run(self, work: Callable[[], Any], done: Callable[[Future[Any]], None]) -> Future[Any]:
        future: Future[Any] = Future()

        def copy() -> None:
            try:
                future.set_result(work())
            except LLMOSError as error:
                future.set_exception(error)
            done(future)

        self.waiting.append(copy)
        return future

    def copy(self) -> None:
        self.waiting.popleft()()


class Ends(list[Moved | LLMOSError]):
    """A sink that keeps what it gets."""

    def done(self, moved: Moved) -> None:
        self.append(moved)

    def fail(self, error: LLMOSError) -> None:
        self.append(error)


class Bench:
    """A null driver with everything that the SDK puts around it."""

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver or NullDriver()
        self.worker = Worker()
        self.executor = Executor(self.driver)
        self.moves = Moves(self.executor, self.worker)  # type: ignore[arg-type]
        if driver is None:
            self.loaded: LoadedModel = self.driver.load(REQUEST, lambda progress: None)

    def move(self, source: Any, target: Any, *pages: tuple[int, int]) -> Ends:
        ends = Ends()
        move = Move(model="m", source=source, target=target, pages=list(pages), tenant="a")
        begin = lambda: self.driver.move(move, b"")  # noqa: E731
        self.moves.submit(move.model, move.replica, begin, ends, reads_device=source == "device")
        return ends

    def quantum(self, **fields: Any) -> Notes:
        notes = Notes()
        self.executor.submit(Quantum(id=1, model="m", **{"steps": 1} | fields), notes)
        return notes


PROMPT = [1, 2, 3, 4, 5, 6]


def start(slot: int, pages: list[int], cached: int = 0, tokens: list[int] = PROMPT) -> Start:
    return Start(slot=slot, tokens=tokens, prompt=len(PROMPT), pages=pages, cached=cached, limit=12)


def test_a_sequence_goes_on_from_pages_that_were_away() -> None:
    bench = Bench()
    bench.quantum(start=[start(0, [0, 1])], chunks=[Chunk(0, 0, 0, 6)])
    out = bench.move("device", "host", (0, 3), (1, 2))
    run(bench.executor)
    bench.worker.copy()
    overwritten = bench.quantum(
        release=[0], start=[start(0, [0, 1], tokens=[9] * 6)], chunks=[Chunk(0, 0, 0, 6)]
    )
    back = bench.move("host", "device", (3, 5), (2, 6))
    run(bench.executor)
    bench.worker.copy()
    first = next_token(PROMPT)
    resumed = bench.quantum(start=[start(1, [5, 6], 6, [*PROMPT, first])], chunks=[Chunk(0, 1, 6, 1)])
    run(bench.executor)
    assert [type(end) for end in (*out, *back)] == [Moved, Moved]
    assert out[0].bytes == 2 * bench.loaded.page_bytes  # type: ignore[union-attr]
    assert len(overwritten.steps) == 1
    assert resumed.steps[0].tokens == [next_token([*PROMPT, first])]


def test_a_sequence_on_pages_that_are_not_its_own_is_refused() -> None:
    bench = Bench()
    bench.quantum(start=[start(0, [0, 1])], chunks=[Chunk(0, 0, 0, 6)])
    bench.move("device", "host", (0, 0), (1, 1))
    run(bench.executor)
    bench.worker.copy()
    bench.move("host", "device", (0, 3), (1, 2))
    run(bench.executor)
    bench.worker.copy()
    notes = bench.quantum(start=[start(1, [2, 3], 6, [*PROMPT, 7])])
    run(bench.executor)
    (error,) = notes.ended
    assert isinstance(error, InvalidArgument)
    assert "page 2 does not hold the KV of tokens 0 to 3" in error.message


def test_a_move_reads_what_the_quanta_before_it_write(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Scripted()
    bench = Bench(driver)

    def move(request: Move, key: bytes) -> PendingMove:
        driver.log.append("move")
        return lambda: lambda: Moved(0, 0)

    monkeypatch.setattr(driver, "move", move)
    bench.quantum(steps=3)
    bench.move("device", "host", (0, 0))
    bench.executor.advance()
    assert "move" not in driver.log
    run(bench.executor)
    assert driver.log[-2:] == ["dispatch 1.2", "move"]


def test_what_comes_from_the_host_is_copied_early_and_written_in_its_turn() -> None:
    bench = Bench()
    bench.quantum(start=[start(0, [0, 1])], chunks=[Chunk(0, 0, 0, 6)], decode=[0], steps=6)
    ends = bench.move("host", "device", (0, 7))
    bench.executor.advance()
    bench.worker.copy()
    assert not ends
    run(bench.executor)
    assert [type(end) for end in ends] == [Moved]


def test_a_move_from_the_host_does_not_overtake_one_that_fills_it() -> None:
    bench = Bench()
    bench.quantum(start=[start(0, [0, 1])], chunks=[Chunk(0, 0, 0, 6)])
    out = bench.move("device", "host", (0, 0), (1, 1))
    back = bench.move("host", "device", (0, 5), (1, 6))
    assert not bench.worker.waiting
    run(bench.executor)
    bench.worker.copy()
    bench.worker.copy()
    assert [type(end) for end in (*out, *back)] == [Moved, Moved]
    notes = bench.quantum(start=[start(1, [5, 6], 6, [*PROMPT, 7])])
    run(bench.executor)
    assert not isinstance(notes.ended[0], LLMOSError)


def test_abandoned_moves_write_nothing_and_tell_their_callers() -> None:
    bench = Bench()
    out = bench.move("device", "host", (0, 0))
    bench.executor.abandon()
    bench.moves.abandon()
    run(bench.executor)
    assert not bench.worker.waiting
    assert [type(end) for end in out] == [Canceled]


def test_abandoning_another_replica_or_model_leaves_a_move_alone() -> None:
    bench = Bench()
    bench.quantum(start=[start(0, [0, 1])], chunks=[Chunk(0, 0, 0, 6)])
    out = bench.move("device", "host", (0, 0))
    for model, replica in (("m", 1), ("n", -1)):
        bench.executor.abandon(model, replica)
        bench.moves.abandon(model, replica)
    run(bench.executor)
    bench.worker.copy()
    assert [type(end) for end in out] == [Moved]


def test_a_driver_that_moves_nothing_says_so() -> None:
    bench = Bench(Scripted())
    ends = bench.move("device", "host", (0, 0))
    run(bench.executor)
    assert [type(end) for end in ends] == [NotSupported]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "host", "target": "host"}, "from host to itself"),
        ({"pages": [(8, 0)]}, "device has no page 8: it has 8"),
        ({"pages": [(0, 4)]}, "host has no page 4: it has 4"),
        ({"pages": [(-1, 0)]}, "device has no page -1"),
        ({"target": "disk"}, "disk has no page 0: it has 0"),
        ({"pages": [(0, 1), (2, 1)]}, "writes none twice"),
        ({"pages": []}, "a page at least"),
        ({"tenant": ""}, "names the tenant"),
        ({"replica": 1}, "no replica 1"),
    ],
)
def test_what_a_move_must_not_name(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "model": "m", "source": "device", "target": "host", "pages": [(0, 0), (7, 3)], "tenant": "a"
    }  # fmt: skip
    check_move(Move(**good), Bench().loaded)
    with pytest.raises(InvalidArgument, match=message):
        check_move(Move(**good | fields), Bench().loaded)
